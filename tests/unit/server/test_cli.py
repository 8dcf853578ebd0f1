"""The command line: light to import, lazy about other packages, one line per error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import MOUNTED, app, main

HEAVY = ["vllm", "torch", "transformers", "fastapi", "openai"]


def test_overview_lists_every_command_without_heavy_imports() -> None:
    """`trimtab --help` answers at once: it imports neither torch nor vLLM nor a web framework."""
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from server.cli import app\n"
        "shown = CliRunner().invoke(app, ['--help'])\n"
        f"print(json.dumps([shown.output, sorted(set({HEAVY}) & set(sys.modules))]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    shown, heavy = json.loads(ended.stdout)
    assert heavy == []
    assert all(name in shown for name in ("serve", "bundle", *MOUNTED))


@pytest.mark.parametrize("name", sorted(MOUNTED))
def test_commands_of_other_packages_are_found(name: str) -> None:
    """Each is imported when it is called, and has help of its own."""
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "Usage" in shown.output


def test_unknown_command_is_told() -> None:
    """A typing error is no traceback."""
    assert CliRunner().invoke(app, ["sreve"]).exit_code == 2


def test_set_up_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own errors end with 1 and a line on stderr that says what to do."""
    monkeypatch.setattr(sys, "argv", ["trimtab", "bundle", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("trimtab: cannot read")
    assert len(told.splitlines()) == 1


def test_settings_come_from_the_environment_and_wrong_ones_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is out of range is an error of the set-up, not a default."""
    monkeypatch.setenv("TRIMTAB_MAX_INFLIGHT", "0")
    told = CliRunner().invoke(app, ["serve", "--model", "nowhere"])
    assert told.exit_code == 1
    assert "max_inflight" in str(told.exception)
