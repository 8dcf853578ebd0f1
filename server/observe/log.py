"""The log: one line for every request and one for every problem, as text or as JSON, without what anyone wrote.

Prompts, answers and keys are never in it. The words of an exception that nobody raised on purpose may quote a prompt:
only its type and its frames are logged. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from enum import StrEnum
from types import TracebackType
from typing import Any

from server.observe.events import Ended
from server.observe.metrics import mode_of

LOGGERS = (("trimtab", logging.INFO), ("uvicorn.error", logging.WARNING))
FACTS = "facts"
"""Attribute of a log record that holds the facts of a line, which JSON tells one by one."""

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LogFormat(StrEnum):
    """How lines look: for people, or for machines."""

    TEXT = "text"
    JSON = "json"


def configure_log(form: LogFormat) -> None:
    """Send the log to stderr."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonLines() if form is LogFormat.JSON else TextLines())
    for name, level in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [stream]
        logger.setLevel(level)
        logger.propagate = False


class TextLines(logging.Formatter):
    """Time, level, logger, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802 - logging's name
        """Types and frames of an exception and of what it came from."""
        return "\n".join(_frames(ei[1]))


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and logger; then the facts of a request, or a message."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        facts = getattr(record, FACTS, None)
        line |= {"message": record.getMessage()} if facts is None else facts
        if record.exc_info:
            line["exception"] = "\n".join(_frames(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=True, separators=(",", ":"), default=str)


class Line:
    """The facts of a line, which become text only where text is written; `event` comes first."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def __str__(self) -> str:
        """As `name=value`; those that are not known are left out."""
        known = {name: value for name, value in self.facts.items() if name != "event" and value is not None}
        return " ".join([str(self.facts["event"]), *(f"{name}={_plain(value)}" for name, value in known.items())])


def facts_of(event: Ended, *, has_scores: bool) -> dict[str, Any]:
    """What a line tells of a request that reached the engine.

    Args:
        event: the request.
        has_scores: also what the probe read.
    """
    resolution, usage = event.resolution, event.usage
    first = event.effects.get(0)
    verdict = event.verdicts[0] if event.verdicts else None
    told: dict[str, Any] = {
        "model": event.generation.model,
        "bundle": resolution.bundle.label,
        "profile": resolution.profile.name,
        "mode": mode_of(resolution),
        "decision": first.decision if first else None,
        "category": first.category if first else resolution.category,
        "steered": bool(first and first.applied),
        "edit": first.edit if first else None,
        "strength": first.strength if first else None,
        "verdict": verdict.outcome if verdict else None,
        "detector": verdict.detector if verdict else None,
        "samples": event.generation.samples,
        "prompt_tokens": usage.prompt if usage else None,
        "completion_tokens": usage.completion if usage else None,
        "cached_tokens": usage.cached if usage else None,
        "complete": event.is_complete,
        "engine_seconds": round(event.seconds, 4),
        "first_token_seconds": None if event.first_token is None else round(event.first_token, 4),
    }
    if has_scores and first is not None and first.scores is not None:
        told["refusal_score"] = round(first.scores.refusal, 4)
        likeliest = sorted(first.scores.categories.items(), key=lambda item: -item[1])[:2]
        told["category_scores"] = {name: round(score, 4) for name, score in likeliest}
    return told


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) or " " in str(value) else str(value)


def _frames(error: BaseException | None) -> list[str]:
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = traceback.extract_tb(error.__traceback__)
        lines += [f"{type(error).__module__}.{type(error).__qualname__}"]
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        error = error.__cause__ or error.__context__
    return lines
