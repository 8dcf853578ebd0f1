"""An engine's scheduler yields to the gateway that started it."""

from __future__ import annotations

import subprocess
import sys

STARTS = """
import os, subprocess, sys
from server.cores import YIELDING, go_before_the_scheduler

child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
try:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    go_before_the_scheduler()
    print(os.getpriority(os.PRIO_PROCESS, child.pid) == YIELDING, os.getpriority(os.PRIO_PROCESS, 0) == mine)
finally:
    child.communicate()
"""


def test_processes_that_this_one_started_yield_to_it() -> None:
    """A child is made nicer, the process itself stays as it was; tried in a process whose children are known."""
    ended = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.split() == ["True", "True"], ended.stderr
