"""Companions: processes of ours that take one order per line and give one answer per line, as JSON.

Several stay resident and only one works at a time, so that rounds of different arms alternate within seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from steering.engine.compat import ENVIRONMENT
from steering.errors import EngineError, EngineTimeout

START_PATIENCE, ROUND_PATIENCE, END_PATIENCE = 900.0, 300.0, 30.0
"""Seconds; an engine that compiles on a busy machine, one round, and the end of a companion that has no more orders."""


class Companion:
    """The parent's end; made by `companion`."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: TextIO) -> None:
        self._name = name
        self._process = process
        self._log = log

    def wait_until_ready(self) -> dict[str, Any]:
        """What the companion says of itself once it can work."""
        return self._answer(START_PATIENCE)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give one order and wait for its answer.

        Raises:
            EngineError: the companion ended; the message has the end of its log.
            EngineTimeout: it did not answer in time.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer(ROUND_PATIENCE)

    def _answer(self, patience: float) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], patience)[0]:
            raise EngineTimeout(f"{self._name} did not answer within {patience:g} s{self._tail()}")
        line = stream.readline()
        if not line:
            raise EngineError(f"{self._name} ended{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        return end_of(self._log)


def end_of(log: TextIO) -> str:
    """The last lines of a process's log, for a message."""
    log.flush()
    log.seek(0)
    return ":\n" + "".join(log.readlines()[-30:])


@contextlib.contextmanager
def companion(
    module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[Companion]:
    """Run `python -m module` until the block ends; its log goes to a file that is removed.

    Args:
        module: calls `serve` below.
        settings: handed over as the only argument.
        environment: variables on top of this process's.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**ENVIRONMENT, **os.environ, **(environment or {})},
            process_group=0,  # a group of its own, with the processes that it starts; see `gateway._server`
        )
        try:
            yield Companion(module, process, log)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=END_PATIENCE)
            # An engine's own processes too: what they hold of a GPU is wanted by the next engine.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def take_over_output() -> TextIO:
    """The companion's end: a stream to answer on, after which everything printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, about: Mapping[str, Any], work: Callable[..., Mapping[str, Any]]) -> None:
    """Say what this companion is, then answer orders until there are no more."""
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(**json.loads(line))), file=answers, flush=True)
