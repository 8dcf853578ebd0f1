"""The CUDA image adds what its base lacks and leaves the rest alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "missing_pins.py"
HASH = "--hash=sha256:" + "0" * 64

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a checkout: the wheel holds no docker folder")


def test_only_pins_that_are_not_installed_are_printed(tmp_path: Path) -> None:
    """Installed distributions are left out under any spelling of their names; the others keep every hash."""
    lock = tmp_path / "lock.txt"
    present = min(found.metadata["Name"] for found in distributions()).upper().replace("-", "_")
    lock.write_text(
        f"# a comment\n{present}==0 \\\n    {HASH}\nno-such-thing==1.0 \\\n    {HASH} \\\n    {HASH}\nnor-this==2\n",
        encoding="utf-8",
    )
    result = subprocess.run([sys.executable, SCRIPT, lock], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"no-such-thing==1.0 \\\n    {HASH} \\\n    {HASH}\nnor-this==2\n"
