"""A process of the engine does not outlive whoever started it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steering.engine.parent import end_with_parent

STARTS = """
import multiprocessing, sys, time
from steering.engine.parent import end_with_parent

def tell(process):
    sys.stdout.write(f"{process}\\n")  # in one piece: two processes share the pipe
    sys.stdout.flush()

def grandchild():
    end_with_parent()
    tell(multiprocessing.current_process().pid)
    time.sleep(600)

def child():
    end_with_parent()
    multiprocessing.get_context(sys.argv[1]).Process(target=grandchild).start()
    tell(multiprocessing.current_process().pid)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=child).start()
    time.sleep(600)
"""


def lives(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_end_with_a_parent_that_is_killed(method: str, tmp_path: Path) -> None:
    """SIGKILL tells nobody; the child sees it by itself, and its own child does in turn."""
    script = tmp_path / "starts.py"  # spawned children read it again
    script.write_text(STARTS, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        try:
            below = [int(process.stdout.readline()) for _ in range(2)]
            assert all(map(lives, below))
        finally:
            process.kill()
            process.wait()
        deadline = time.monotonic() + 20
        while any(map(lives, below)):
            assert time.monotonic() < deadline, "a child outlives its parent"
            time.sleep(0.05)


def test_a_process_that_nobody_started_so_is_left_alone() -> None:
    """An engine in a script of somebody's own, started from a shell, goes on when the shell ends."""
    assert multiprocessing.parent_process() is None
    end_with_parent()
    assert all(thread.name != "parent" for thread in threading.enumerate())
