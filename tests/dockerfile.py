"""Dockerfiles, read as instructions.

Knows nothing of what they should hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {"cuda": ROOT / "Dockerfile", "cpu": ROOT / "docker" / "Dockerfile.cpu"}


class Step(NamedTuple):
    """One instruction and its arguments, on one line."""

    word: str
    rest: str


def steps(image: str) -> list[Step]:
    """The instructions of an image, without comments."""
    text = IMAGES[image].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def rest(image: str, word: str) -> list[str]:
    """The arguments of every instruction of this kind."""
    return [step.rest for step in steps(image) if step.word == word]


def environment(image: str) -> Iterator[tuple[str, str]]:
    """The variables that an image sets, with their values; those of build arguments are their defaults."""
    defaults = dict(line.split("=", 1) for line in rest(image, "ARG") if "=" in line)
    for line in rest(image, "ENV"):
        for pair in line.split():
            name, value = pair.split("=", 1)
            yield name, defaults[value[2:-1]] if value.startswith("${") else value
