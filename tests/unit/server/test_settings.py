"""Settings: the command line before the environment, and that before one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from server.cli import app
from server.process import serve
from server.settings import Settings
from steering.errors import AuditUnavailable, KeyFileError, TrimtabError, UnsupportedConfiguration
from tests.unit.server.keyed import record, write_keys

FILE = """\
port = 9000
max_inflight = 16
bundles = ["a", "b"]
keys_file = "keys.json"
audit_log = "/audit/audit.jsonl"

[enforced_share]
"*" = 0.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of settings."""
    path = tmp_path / "trimtab.toml"
    path.write_text(FILE)
    return path


def test_the_file_holds_settings_by_their_names(file: Path) -> None:
    """Numbers, paths, lists and tables; what it does not name is the default."""
    found = Settings(config=file)
    assert (found.port, found.max_inflight, found.host) == (9000, 16, "127.0.0.1")
    assert (found.bundles, found.keys_file) == ((Path("a"), Path("b")), Path("keys.json"))
    assert found.enforced_share == {"*": 0.5}
    assert found.access.audit_log == Path("/audit/audit.jsonl")


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each for what it names and for nothing else; the file may be named in the environment as well."""
    monkeypatch.setenv("TRIMTAB_CONFIG", str(file))
    monkeypatch.setenv("TRIMTAB_PORT", "9001")
    found = Settings()
    assert (found.port, found.max_inflight) == (9001, 16)
    found = Settings(port=9002)
    assert (found.port, found.max_inflight) == (9002, 16)
    other = file.with_name("other.toml")
    other.write_text("max_inflight = 17\n")
    assert Settings(config=other).max_inflight == 17


@pytest.mark.parametrize(
    ("text", "told"),
    [("prot = 9000\n", "prot"), ("port = 99999\n", "port"), ("port = \n", "cannot be read"), (None, "no file")],
)
def test_a_file_with_a_mistake_stops_the_start(file: Path, text: str | None, told: str) -> None:
    """A name that is none, a value out of range, what is no TOML, and a file that is not there."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises((ValidationError, UnsupportedConfiguration), match=told):
        Settings(config=file)
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert isinstance(result.exception, TrimtabError)
    assert told in result.exception.message


def test_the_command_line_reaches_the_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--keys`, `--config` and the two of signatures."""
    taken: list[Settings] = []
    monkeypatch.setattr("server.process.serve", lambda order, settings, **_: taken.append(settings))
    words = ["--config", file, "--keys", "k.json", "--require-signature", "--signature-key", "k.pub", "--model", "m"]
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    assert result.exit_code == 0, result.output
    (settings,) = taken
    assert (settings.port, settings.keys_file, settings.config) == (9000, Path("k.json"), file)
    assert (settings.require_signature, settings.signature_key) == (True, Path("k.pub"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"host": "0.0.0.0"}, UnsupportedConfiguration),  # noqa: S104 - refused is the point
        ({"admin_host": "0.0.0.0"}, UnsupportedConfiguration),  # noqa: S104 - refused is the point
        ({"keys_file": "nowhere.json"}, KeyFileError),
        ({"keys_file": "keys.json"}, KeyFileError),
        ({"audit_log": "nowhere/audit.jsonl"}, AuditUnavailable),
        ({"audit_secret_file": "secret"}, UnsupportedConfiguration),
    ],
)
def test_what_would_fail_later_fails_before_the_engine_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: type[TrimtabError]
) -> None:
    """Keys that cannot be read or must be on record, and records that cannot be written, stop the start at once."""
    monkeypatch.chdir(tmp_path)
    write_keys(tmp_path / "keys.json", record("relax", permissions=["steer:relax"]))
    with pytest.raises(error):
        serve(None, Settings(**settings), on_ready=lambda *_: None)  # type: ignore[arg-type] # not looked at
