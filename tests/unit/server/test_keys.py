"""The file of API keys: what it may hold, how it is read again, and the commands that write it."""

from __future__ import annotations

import hmac
import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import server.access.keys as keys_module
from server.access.caller import Permission
from server.access.keys import KeyRing, bearer, hash_of, new_key, read_key_file
from server.cli import app
from steering.errors import KeyFileError

KEY, OTHER = new_key(), new_key()


def record(key: str = KEY, **fields: Any) -> dict[str, Any]:
    """A key of the file."""
    return {"id": "team-a", "sha256": hash_of(key), "tenant": "a", **fields}


def write(path: Path, *records: dict[str, Any], text: str | None = None) -> Path:
    """The file, as `trimtab key` writes it: another one each time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"version": 1, "keys": records}) if text is None else text)
    new.chmod(0o600)
    new.replace(path)
    return path


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.day = datetime(2027, 1, 1, tzinfo=UTC)

    def ring(self, path: Path, **arguments: Any) -> KeyRing:
        """Keys that go by this clock."""
        return KeyRing(
            path, **{"is_audited": True, "clock": lambda: self.seconds, "now": lambda: self.day, **arguments}
        )


def test_a_key_is_256_random_bits_and_the_file_holds_its_hash() -> None:
    """Keys look like ours, differ, and are not in what is stored of them."""
    assert len({new_key() for _ in range(100)}) == 100
    assert all(len(key) == len("tt-") + 43 and key.startswith("tt-") for key in (KEY, OTHER))
    assert KEY not in json.dumps(record())


def test_what_a_key_may_is_denied_unless_said(tmp_path: Path) -> None:
    """A bare record grants nothing: no permission, no profile but the default, no category; limits do not apply."""
    found = Clock().ring(write(tmp_path / "keys.json", record())).caller(KEY)
    assert found is not None
    assert (found.key_id, found.tenant) == ("team-a", "a")
    assert (found.permissions, found.profiles, found.categories) == (frozenset(), frozenset(), frozenset())
    assert (found.strength, found.allowance.requests, found.allowance.max_tokens) == (None, None, None)


def test_what_is_said_is_granted(tmp_path: Path) -> None:
    """Every field of the file reaches the caller."""
    fields = {
        "permissions": ["steer:use", "steer:relax"],
        "profiles": "*",
        "categories": ["Safety"],
        "strength": {"minimum": 0.5, "maximum": 1.0},
        "limits": {"requests_per_minute": 60, "tokens_per_minute": 1000, "concurrent": 4, "max_tokens": 50},
    }
    found = Clock().ring(write(tmp_path / "keys.json", record(**fields))).caller(KEY)
    assert found is not None
    assert found.permissions == {Permission.USE, Permission.RELAX}
    assert (found.profiles, found.categories, found.strength) == (None, {"Safety"}, (0.5, 1.0))
    allowance = found.allowance
    assert (allowance.requests, allowance.tokens, allowance.concurrent, allowance.max_tokens) == (60, 1000, 4, 50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "file"),
        ('{"keys": []}', "version"),
        (json.dumps({"version": 1, "keys": [record(permission=["admin"])]}), "keys.0.permission"),
        (json.dumps({"version": 1, "keys": [record(permissions=["root"])]}), "keys.0.permissions.0"),
        (json.dumps({"version": 1, "keys": [record(sha256="x")]}), "keys.0.sha256"),
        (json.dumps({"version": 1, "keys": [record(profiles=["*", "a"])]}), "not in a list"),
        (json.dumps({"version": 1, "keys": [record(limits={"requests_per_minute": 0})]}), "requests_per_minute"),
        (json.dumps({"version": 1, "keys": [record(limits={"requests_per_minute": "60"})]}), "requests_per_minute"),
        (json.dumps({"version": 1, "keys": [record(expires="2027-01-01T00:00:00")]}), "keys.0.expires"),
        (json.dumps({"version": 1, "keys": [record(strength={"minimum": 2.0, "maximum": 1.0})]}), "minimum"),
        (json.dumps({"version": 1, "keys": [record(), record(OTHER)]}), "several keys have id team-a"),
        (json.dumps({"version": 1, "keys": [record(), record(id="b")]}), "several keys have sha256"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    """Unknown fields, permissions that do not exist, wrong types and doubles: what is at fault is told."""
    with pytest.raises(KeyFileError, match=words):
        read_key_file(write(tmp_path / "keys.json", text=text))


def test_a_file_that_others_can_write_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever writes the file makes keys; that others can read it is told, since it holds hashes alone."""
    path = write(tmp_path / "keys.json", record())
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_key_file(path)
    path.chmod(0o644)
    logging.getLogger("trimtab").addHandler(caplog.handler)
    read_key_file(path)
    logging.getLogger("trimtab").removeHandler(caplog.handler)
    assert "can be read by everyone" in caplog.text
    with pytest.raises(KeyFileError, match="trimtab key create"):
        read_key_file(tmp_path / "nowhere.json")


def test_keys_that_must_be_on_record_need_a_record(tmp_path: Path) -> None:
    """Without an audit no key may lower refusals or administer, whether at the start or later."""
    clock = Clock()
    for permission in ("steer:relax", "admin"):
        path = write(tmp_path / "keys.json", record(permissions=[permission]))
        with pytest.raises(KeyFileError, match="TRIMTAB_AUDIT_LOG"):
            clock.ring(path, is_audited=False)
    ring = clock.ring(write(tmp_path / "keys.json", record()), is_audited=False)
    write(tmp_path / "keys.json", record(permissions=["steer:relax"]))
    clock.seconds += 2
    found = ring.caller(KEY)
    assert found is not None
    assert found.permissions == frozenset()


def test_keys_change_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    """A new key is let in and a revoked one is not, within a second or two; a file that cannot be used, or is gone,
    keeps the keys that were there, and is told once.
    """
    clock, told = Clock(), list[bool]()
    path = write(tmp_path / "keys.json", record())
    ring = clock.ring(path, on_load=told.append)
    write(path, record(OTHER))
    assert ring.caller(KEY) is not None  # the file is not looked at for every request
    clock.seconds += 1.5
    assert ring.caller(KEY) is None
    assert ring.caller(OTHER) is not None
    assert ring.ids == {"team-a"}
    for broken in (lambda: write(path, text='{"version": 1, "keys": [{'), lambda: path.chmod(0o666), path.unlink):
        broken()
        for _ in range(3):
            clock.seconds += 1.5
            assert ring.caller(OTHER) is not None
    write(path, record())
    clock.seconds += 1.5
    assert ring.caller(KEY) is not None
    assert told == [True, False, False, False, True]


def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    """To the second, by the time of day."""
    clock = Clock()
    ring = clock.ring(write(tmp_path / "keys.json", record(expires="2027-01-01T00:00:10Z")))
    assert ring.caller(KEY) is not None
    clock.day += timedelta(seconds=10)
    assert ring.caller(KEY) is None


def test_every_key_is_compared_whether_or_not_one_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons does not depend on which key was presented, and each is of whole digests."""
    records = [record(KEY, id="first"), *(record(new_key(), id=f"key-{number}") for number in range(9))]
    ring = Clock().ring(write(tmp_path / "keys.json", *records))
    compared: list[tuple[int, int]] = []

    class Counting:
        @staticmethod
        def compare_digest(one: bytes, other: bytes) -> bool:
            compared.append((len(one), len(other)))
            return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys_module, "hmac", Counting)
    for presented in (KEY, OTHER, "", "x" * 10_000, "\udce9"):
        compared.clear()
        assert (ring.caller(presented) is not None) == (presented == KEY)
        assert compared == [(32, 32)] * 10


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        (["Bearer tt-x"], "tt-x"),
        (["bearer   tt-x "], "tt-x"),
        ([], None),
        (["tt-x"], None),
        (["Basic dHQteA=="], None),
        (["Bearer"], None),
        (["Bearer tt-x tt-y"], None),
        (["Bearer tt-x", "Bearer tt-y"], None),
    ],
)
def test_only_one_bearer_is_a_key(headers: list[str], key: str | None) -> None:
    """One header, one scheme, one word: anything else could be read in two ways."""
    assert bearer(headers) == key


class TestCommands:
    """`trimtab key`."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """The file that is written."""
        return tmp_path / "keys.json"

    def run(self, path: Path, *words: str, code: int = 0) -> str:
        """What a command prints."""
        result = CliRunner().invoke(app, ["key", *words, "--keys", str(path)])
        assert result.exit_code == code, result.output
        return result.output if code == 0 else str(result.exception)

    def test_a_key_is_made_and_told_once(self, path: Path) -> None:
        """It opens the server, its file is its owner's alone, and no command tells it again."""
        words = ["--tenant", "t", "--permission", "steer:use", "--permission", "steer:custom", "--profile", "*"]
        words += ["--category", "Safety", "--strength", "0:1.5", "--requests", "60", "--expires", "2030-01-01"]
        key = self.run(path, "create", "team-a", *words).strip()
        assert path.stat().st_mode & 0o777 == 0o600
        found = Clock().ring(path).caller(key)
        assert found is not None
        assert found.permissions == {Permission.USE, Permission.CUSTOM}
        assert (found.tenant, found.profiles, found.categories) == ("t", None, {"Safety"})
        assert (found.strength, found.allowance.requests) == ((0.0, 1.5), 60)
        assert key not in path.read_text()
        listed = self.run(path, "list")
        assert key not in listed
        assert hash_of(key) not in listed
        assert "team-a  tenant=t  permissions=steer:use,steer:custom  profiles=*" in listed

    def test_a_bare_key_may_nothing_and_is_a_tenant_of_its_own(self, path: Path) -> None:
        """What is not asked for is not granted."""
        found = Clock().ring(path).caller(key) if (key := self.run(path, "create", "b").strip()) else None
        assert found is not None
        assert (found.tenant, found.permissions, found.profiles) == ("b", frozenset(), frozenset())

    def test_a_revoked_key_is_gone_and_others_stay(self, path: Path) -> None:
        """Only the one that is named; one that is not there is told, with those that are."""
        first, second = (self.run(path, "create", name).strip() for name in ("a", "b"))
        assert self.run(path, "revoke", "a") == "revoked a\n"
        ring = Clock().ring(path)
        assert ring.caller(first) is None
        assert ring.caller(second) is not None
        assert "keys: ['b']" in self.run(path, "revoke", "a", code=1)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["create", "a"], "has a key 'a' already"),
            (["create", "a b"], "id:"),
            (["create", "c", "--strength", "1"], "0:1.5"),
            (["create", "c", "--requests", "0"], "requests_per_minute"),
        ],
    )
    def test_a_wrong_order_writes_nothing(self, path: Path, words: list[str], told: str) -> None:
        """What is at fault is told, and the file is as it was."""
        self.run(path, "create", "a")
        before = path.read_bytes()
        assert told in self.run(path, *words, code=1)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 - hidden files as well
