"""`trimtab fit topics`: what the command says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--refused", "no-such.txt"], "neither a file nor a part"),
        (["--refused", "ccp_sensitive/sampled_test"], "may not be fitted on"),
        (["--preset", "paper-extended"], "has no constants for"),
        (["--judge", "llm"], "go together"),
        (["--judge", "keyword", "--judge-url", "u", "--judge-model", "m"], "go together"),
        (["--method", "pca"], "methods: md, wmd, rmd, wrmd"),
        (["--lambda", "0"], "above 0"),
        (["--engine", "dtype=float32"], "value as JSON"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    tiny_path: Path, tmp_path: Path, given: list[str], told: str
) -> None:
    """Mistakes of the caller end with status 1 and a sentence, before any engine is started."""
    from typer.testing import CliRunner

    from steering.fit.cli import app

    work = ["--model", str(tiny_path), "--work", str(tmp_path / "work"), "--bundle", str(tmp_path / "bundle")]
    found = CliRunner().invoke(app, ["topics", *work, *given])
    assert found.exit_code == 1
    assert told in " ".join(found.output.split())
    assert not (tmp_path / "bundle").exists()
