"""Cores: who goes first where the gateway and an engine that computes on the CPU share them.

Knows nothing of vLLM or HTTP.
"""

from __future__ import annotations

import contextlib
import os

import psutil  # type: ignore[import-untyped]  # vLLM requires it

YIELDING = 10
"""Niceness of the engine's scheduler, which anybody may give a process of their own."""


def go_before_the_scheduler() -> None:
    """Have the engine's scheduler yield to this process.

    On a CPU the scheduler waits for its workers without sleeping; a gateway that the kernel puts on the same core is
    then not woken before an answer has ended, and streams it in one piece. Workers keep their priority.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            for thread in child.threads():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, YIELDING)
