"""Answers on disk, one JSON object a line: what was asked already is not asked again.

A line is found by the prompt's key and a digest of all else that the answer depends on: the request without its prompt,
the model and the bundles that are served. Arms that ask the same thing share an answer. A half-written last line, as a
kill leaves it, is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from steering.errors import OperatorError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one request.

    Attributes:
        error: code of the error that answered it; empty where an answer came. Text and all else is empty then.
        text: without the decision token, which the server keeps out.
        refused, verdict_category: the server's verdict; None where it could not tell.
        detector: who gave that verdict, by the server's own name.
        decision: what the server says it decided: `refuse`, `comply`, `abstain` or `off`.
        category: whose edit that decision is about.
        edit, strength: as applied.
        score: the probe's probability of refusal.
        categories: the probe's probabilities of the categories.
        first: probability of each decision token in the first place, by its text, among the 20 likeliest.
        loss: mean negative log-probability of the tokens of the answer.
        tokens: of the answer.
    """

    error: str = ""
    text: str = ""
    refused: bool | None = None
    verdict_category: str | None = None
    detector: str = ""
    decision: str = ""
    category: str | None = None
    edit: str | None = None
    strength: float | None = None
    score: float | None = None
    categories: dict[str, float] | None = None
    first: dict[str, float] | None = None
    loss: float | None = None
    tokens: int = 0


def request_digest(request: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Digest of a request, its prompt left out, to one server."""
    told = {"request": {name: value for name, value in request.items() if name != "messages"}, "server": dict(identity)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def prompt_digest(prompt: str) -> str:
    """Digest of a prompt's text, so that a changed data set is asked anew."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


class Journal:
    """Answers by (prompt, digest), read when it is opened and appended to as they come; a context manager.

    Args:
        path: its file.
        is_alone: nobody else may open it so while it is open.

    Raises:
        OperatorError: another run has it open alone, or a line is not of this format.
    """

    def __init__(self, path: Path, *, is_alone: bool = False) -> None:
        self.path = path
        self._answers: dict[tuple[str, str], Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")
        try:
            if is_alone:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = _read(path)
        except BlockingIOError as error:
            self._stream.close()
            raise OperatorError(f"another run writes to {path}; wait for it, or name another folder") from error
        except OperatorError:
            self._stream.close()
            raise
        for line in whole:
            answer = Answer(**line["answer"])
            self._answers[line["prompt"], line["digest"]] = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, prompt: str, digest: str) -> Answer | None:
        """The answer that is there already."""
        return self._answers.get((prompt, digest))

    def keep(self, prompt: str, digest: str, answer: Answer) -> None:
        """Append an answer; on disk when this returns."""
        self._answers[prompt, digest] = answer
        filled = {name: value for name, value in asdict(answer).items() if value not in (None, "")}
        line = json.dumps({"prompt": prompt, "digest": digest, "answer": filled}, separators=(",", ":"))
        self._stream.write(line + "\n")
        self._stream.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file, which is cut back to them.

    Raises:
        OperatorError: a line before the last is not of this format.
    """
    payload = path.read_bytes()
    end = payload.rfind(b"\n") + 1
    if end < len(payload):
        with path.open("r+b") as stream:
            stream.truncate(end)
    found = []
    for number, line in enumerate(payload[:end].splitlines(), 1):
        try:
            entry = json.loads(line)
            Answer(**entry["answer"])
        except (ValueError, TypeError, KeyError) as error:
            raise OperatorError(f"{path}:{number} is not an answer ({error}); delete the file to begin anew") from error
        found.append(entry)
    return found
