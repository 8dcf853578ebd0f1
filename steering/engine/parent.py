"""Parent: a process of the engine ends with the process that started it, however that one ended.

vLLM ends its processes when it is told to stop, and its workers when their engine dies; a server that is killed cannot
tell, and its engine would keep the device. Knows nothing of vLLM or torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

LOOK = 1.0
"""Seconds between looks at who the parent is, for the case that its end is not told."""

_watched = 0
"""Process in which a thread waits. A fork copies the number, and not the thread."""


def end_with_parent() -> None:
    """From now on, kill this process when its parent is gone; does nothing in a process that is nobody's child.

    A thread waits for it. The kernel's own signal (`PR_SET_PDEATHSIG`) comes as well when only the thread ends that
    started the process, and engines are started from threads.
    """
    global _watched  # noqa: PLW0603 - one process has one parent
    if multiprocessing.parent_process() is None or _watched == os.getpid():
        return
    _watched = os.getpid()
    threading.Thread(target=_wait, args=(os.getppid(),), name="parent", daemon=True).start()


def _wait(parent_id: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not wait([parent.sentinel], LOOK) and os.getppid() == parent_id:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
