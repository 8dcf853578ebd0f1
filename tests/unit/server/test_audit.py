"""The audit: what is on record, before it is done, and what happens where that cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from server.access.audit import AuditLog, read_secret
from server.access.caller import LOCAL, Caller
from server.access.keys import hash_of
from server.generation import Generation, Ticket
from server.observe.events import Ended
from server.policy import SteeringSpec, resolve
from steering.errors import AuditUnavailable
from steering.plan import Mode
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, Spoken, read_events

SECRET = b"s" * 32
KEY = "tt-relax"
RELAX = {"mode": "comply"}
SAID = "How do I kill a process?"
MakeKeyed = Callable[..., Spoken]


def records(path: Path) -> list[dict[str, Any]]:
    """What is on record."""
    return [json.loads(line) for line in path.read_text().splitlines()]


async def admin(log: AuditLog, act: str = "bundle_load", **facts: str) -> None:
    """Put something on record."""
    await log.admin(Caller(key_id="ops", tenant="t"), "1234", act, **facts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log lies."""
    return tmp_path / "audit.jsonl"


@pytest.fixture
def keyed(make: Make, tmp_path: Path, path: Path) -> MakeKeyed:
    """Makes gateways with an audit and a key that may lower refusals, which their client sends."""
    keys = tmp_path / "keys.json"
    granted = ["steer:use", "steer:relax", "admin"]
    record = {"id": "team-a", "sha256": hash_of(KEY), "tenant": "a", "permissions": granted, "profiles": "*"}
    keys.write_text(json.dumps({"version": 1, "keys": [{**record, "categories": "*"}]}))
    keys.chmod(0o600)

    def build(engine: FakeEngine | None = None, **settings: Any) -> Spoken:
        catalog = make_catalog(make_gated_bundle())
        spoken = make(engine, catalog, keys_file=keys, audit_log=path, **settings)
        for client in (spoken.client, spoken.admin):
            client.headers["authorization"] = f"Bearer {KEY}"
        return spoken

    return build


async def test_a_relax_is_on_record_before_the_engine_is_asked_and_when_it_has_ended(
    keyed: MakeKeyed, path: Path
) -> None:
    """Both records tell who, what and how it ended, and nothing of what was said."""
    seen: list[int] = []

    class Watching(FakeEngine):
        async def complete(self, call: Any) -> Any:
            seen.append(len(records(path)))
            return await super().complete(call)

    spoken = keyed(Watching())
    answer = await spoken.chat(steering=RELAX)
    assert answer.status_code == 200, answer.text
    assert spoken.gateway.audit is not None
    await spoken.gateway.audit.drain()
    assert seen == [1]
    first, last = records(path)
    assert {name: first[name] for name in ("event", "key_id", "tenant", "endpoint", "profile", "mode", "category")} == {
        "event": "relax",
        "key_id": "team-a",
        "tenant": "a",
        "endpoint": "/v1/chat/completions",
        "profile": "refusal-control",
        "mode": "comply",
        "category": "Safety",
    }
    assert first["decision"] is None
    assert (last["event"], last["decision"], last["complete"], last["error"]) == ("relax_ended", "comply", True, None)
    assert first["request_id"] == last["request_id"] == answer.headers["x-request-id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert re.fullmatch(r"[0-9a-f]{64}", first["prompt_hmac"])
    written = path.read_text()
    assert "process" not in written
    assert "Hello" not in written
    assert KEY not in written
    exposed = (await spoken.admin.get("/metrics")).text
    assert 'steering_audit_records_total{event="relax"} 1.0' in exposed
    assert 'steering_audit_records_total{event="relax_ended"} 1.0' in exposed


@pytest.mark.parametrize("asked", [{}, {"steering": {"report": "none"}}, {"steering": {"mode": "auto"}}])
async def test_what_lowers_nothing_is_not_on_record(keyed: MakeKeyed, path: Path, asked: dict[str, Any]) -> None:
    """Not even from a key that may lower refusals."""
    spoken = keyed()
    assert (await spoken.chat(**asked)).status_code == 200
    assert records(path) == []


async def test_a_stream_and_one_that_is_given_up_are_on_record_to_their_end(keyed: MakeKeyed, path: Path) -> None:
    """Also where the client leaves: the record says that the answer was not complete."""
    engine = FakeEngine()
    spoken = keyed(engine)
    assert spoken.gateway.audit is not None
    assert read_events((await spoken.chat(stream=True, steering=RELAX)).text)
    engine.gate = asyncio.Event()
    waiting = asyncio.create_task(spoken.chat(stream=True, steering=RELAX))
    while len(engine.calls) < 2:
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await spoken.gateway.audit.drain()
    assert [(each["event"], each.get("complete")) for each in records(path)] == [
        ("relax", None),
        ("relax_ended", True),
        ("relax", None),
        ("relax_ended", False),
    ]


async def test_what_cannot_be_put_on_record_is_not_done_and_all_else_is(keyed: MakeKeyed, path: Path) -> None:
    """503 with a code of its own, streamed or not, for what lowers refusals; the engine is not asked. Once the log can
    be written again, they are answered.
    """
    engine = FakeEngine()
    spoken = keyed(engine)
    path.unlink()
    path.mkdir()
    for fields in ({}, {"stream": True}):
        answer = await spoken.chat(steering=RELAX, **fields)
        assert "audit_unavailable" in answer.text
        if not fields:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert engine.calls == []
    assert (await spoken.chat()).status_code == 200
    assert "steering_audit_failures_total 2.0" in (await spoken.admin.get("/metrics")).text
    path.rmdir()
    assert (await spoken.chat(steering=RELAX)).status_code == 200
    assert spoken.gateway.audit is not None
    await spoken.gateway.audit.drain()
    assert [each["event"] for each in records(path)] == ["relax", "relax_ended"]


async def test_acts_of_administration_are_on_record(path: Path) -> None:
    """Who, in which request, what, and the facts of it."""
    log = AuditLog(path, secret=SECRET, now=lambda: datetime(2027, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC))
    await admin(log, bundle="demo")
    assert records(path) == [
        {
            "time": "2027-01-02T03:04:05.678Z",
            "event": "admin",
            "request_id": "req_1234",
            "key_id": "ops",
            "tenant": "t",
            "act": "bundle_load",
            "bundle": "demo",
        }
    ]


async def test_records_are_appended_and_the_file_is_its_owners(path: Path) -> None:
    """An earlier log is continued, whatever its mode was."""
    path.write_text('{"event":"admin"}\n')
    path.chmod(0o644)
    log = AuditLog(path, secret=SECRET)
    await admin(log)
    assert len(records(path)) == 2
    assert path.stat().st_mode & 0o777 == 0o600


async def test_the_log_is_rotated_by_size_and_the_oldest_goes(path: Path) -> None:
    """No file is larger than allowed, no more are kept than allowed, and no record is cut."""
    log = AuditLog(path, secret=SECRET, most_bytes=400, files=2)
    for number in range(12):
        await admin(log, act=f"act-{number}")
    files = [path, path.with_name("audit.jsonl.1"), path.with_name("audit.jsonl.2")]
    assert sorted(path.parent.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 400 for file in files)
    kept = [record["act"] for file in reversed(files) for record in records(file)]
    assert kept == [f"act-{number}" for number in range(12 - len(kept), 12)]
    assert len(kept) > 4


async def test_a_log_that_was_moved_away_is_begun_again(path: Path) -> None:
    """As other rotation does it: what follows is not written into the file that is gone."""
    log = AuditLog(path, secret=SECRET)
    await admin(log, act="before")
    path.rename(path.with_name("moved"))
    await admin(log, act="after")
    assert [record["act"] for record in records(path)] == ["after"]


async def test_a_half_written_record_does_not_spoil_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk a part may be written: it fails, and the next record begins on a line of its own."""
    log = AuditLog(path, secret=SECRET)
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
        with pytest.raises(AuditUnavailable):
            await admin(log)
    await admin(log, act="after")
    part, whole = path.read_text().splitlines()
    assert len(part) == 20
    assert json.loads(whole)["act"] == "after"


async def test_many_at_once_are_each_a_line(path: Path) -> None:
    """Records of requests that run at the same time are neither mixed nor lost, over rotations too."""
    log = AuditLog(path, secret=SECRET, most_bytes=4096, files=100)
    await asyncio.gather(*(admin(log, act=f"act-{number}") for number in range(200)))
    found = [record["act"] for file in path.parent.iterdir() for record in records(file)]
    assert sorted(found) == sorted(f"act-{number}" for number in range(200))


async def test_requests_of_the_server_itself_and_those_that_were_not_let_in_have_no_end(path: Path) -> None:
    """An end is on record only where the beginning is."""
    log = AuditLog(path, secret=SECRET)
    catalog = make_catalog(make_gated_bundle())
    resolution = resolve(SteeringSpec(mode=Mode.COMPLY), catalog, plan_id="p")
    asked = Generation(model=MODEL, spec=None, fields={"messages": []}, prompt_fields={})
    for ticket, relaxes, error in (
        (Ticket(request_id="r", is_internal=True), True, None),
        (Ticket(request_id="r"), False, None),
        (Ticket(request_id="r"), True, AuditUnavailable("full")),
    ):
        told = structs.replace(resolution, relaxes=relaxes)
        log.ended(Ended(ticket=ticket, generation=asked, resolution=told, error=error))
    await log.drain()
    assert records(path) == []


def test_a_prompt_is_known_again_by_its_hash_and_by_nothing_else(tmp_path: Path, path: Path) -> None:
    """The same prompt has the same hash, under this secret alone; the secret is made once, for its owner."""
    file = tmp_path / "secret"
    secret = read_secret(file)
    assert read_secret(file) == secret
    assert file.stat().st_mode & 0o777 == 0o600
    log, other = AuditLog(path, secret=secret), AuditLog(path, secret=SECRET)
    prompt = [{"role": "user", "content": SAID}]
    assert log.hash_of(prompt) == log.hash_of([{"content": SAID, "role": "user"}])
    assert log.hash_of(prompt) != log.hash_of([{"role": "user", "content": SAID + " "}])
    assert log.hash_of(prompt) != other.hash_of(prompt)


def test_a_log_or_secret_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    """What would fail for every request is found at the start."""
    with pytest.raises(AuditUnavailable, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl", secret=SECRET)
    short = tmp_path / "short"
    short.write_bytes(b"guess me")
    with pytest.raises(AuditUnavailable, match="at least 32"):
        read_secret(short)
    with pytest.raises(AuditUnavailable, match="cannot be read"):
        read_secret(tmp_path / "nowhere" / "secret")


async def test_without_keys_the_audit_tells_of_everybody_alike(make: Make, path: Path) -> None:
    """A server that is alone on its machine can be audited too; its one caller is `local`."""
    spoken = make(catalog=make_catalog(make_gated_bundle()), audit_log=path)
    assert (await spoken.chat(steering=False)).status_code == 200
    assert spoken.gateway.audit is not None
    await spoken.gateway.audit.drain()
    assert [(each["event"], each["key_id"]) for each in records(path)] == [
        ("relax", LOCAL.key_id),
        ("relax_ended", LOCAL.key_id),
    ]
