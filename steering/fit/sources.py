"""What an entry of the catalogue is made of, and the readers of the formats that data sets come in.

Knows nothing of any particular set, nor of where files lie.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Use(StrEnum):
    """What a part of a set may be used for."""

    FIT = "fit"
    CALIBRATE = "calibrate"
    TEST = "test"


class Label(StrEnum):
    """What kind of prompt a record holds."""

    HARMFUL = "harmful"
    BORDERLINE = "borderline"
    BENIGN = "benign"
    NONCOMPLIANCE = "noncompliance"
    SENSITIVE = "sensitive"
    PHRASE = "phrase"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as a reader finds it: the set's own id and category, and the answer where the set has one."""

    id: str
    prompt: str
    label: Label
    category: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a set.

    Args:
        name: file name inside the set's folder of the data directory.
        sha256: digest of the bytes this project uses.
        address: raw address that gives exactly these bytes, or None where the file was converted.
        conversion: for a file without an address, how to make it from its origin.
        columns: columns or keys that a reader uses or a user meets.
    """

    name: str
    sha256: str
    columns: tuple[str, ...]
    address: str | None = None
    conversion: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A named share of a set with one reader.

    Args:
        file: name of the `SourceFile` it is read from.
        shares: for each allowed use its share of the rows, cut by a hash of the row id;
            a use that is absent is forbidden.
        read: turns the file's text into rows.
    """

    name: str
    file: str
    shares: dict[Use, float]
    read: Callable[[str], Iterator[Row]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One set of the registry; `name` is also its folder in the data directory."""

    name: str
    title: str
    repository: str
    commit: str | None
    licence: str
    attribution: str
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]


def _records(text: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, or of a JSON file that is one list of objects."""
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def _table(text: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(text, newline=""))


def from_csv(
    prompt: str,
    label: Label,
    *,
    identity: str | None = None,
    category: str | None = None,
    where: Callable[[dict[str, str]], bool] = lambda _row: True,
    answer: str | None = None,
) -> Callable[[str], Iterator[Row]]:
    """Reader of a CSV file; without an identity column the 0-based row number is the id."""

    def read(text: str) -> Iterator[Row]:
        for number, row in enumerate(_table(text)):
            if where(row):
                yield Row(
                    id=row[identity] if identity else str(number),
                    prompt=row[prompt].strip(),
                    label=label,
                    category=row[category] if category else None,
                    answer=row[answer] if answer else None,
                )

    return read


def from_json(
    prompt: str,
    label: Label,
    *,
    identity: str | None = None,
    category: str | None = None,
    answer: str | None = None,
) -> Callable[[str], Iterator[Row]]:
    """Reader of JSON Lines or of a JSON list of objects."""

    def read(text: str) -> Iterator[Row]:
        for number, row in enumerate(_records(text)):
            yield Row(
                id=str(row[identity]) if identity else str(number),
                prompt=str(row[prompt]).strip(),
                label=label,
                category=str(row[category]) if category else None,
                answer=str(row[answer]).strip() if answer else None,
            )

    return read


def read_nested(text: str) -> Iterator[Row]:
    """`{topic: {subtopic: [question, ...]}}` or a flat list; the category is the topic."""
    tree = json.loads(text)
    if isinstance(tree, list):
        tree = {"": {"": tree}}
    for topic, subtopics in tree.items():
        for subtopic, questions in subtopics.items():
            for number, question in enumerate(questions):
                identity = f"{topic}/{subtopic.strip(':')}/{number}".strip("/")
                yield Row(id=identity, prompt=question.strip(), label=Label.HARMFUL, category=topic or None)


def read_instructions(text: str) -> Iterator[Row]:
    """GPTeacher rows: instruction, optional input, response."""
    for number, row in enumerate(_records(text)):
        given = str(row.get("input") or "").strip()
        prompt = str(row["instruction"]).strip()
        yield Row(
            id=str(number),
            prompt=f"{prompt}\n{given}" if given else prompt,
            label=Label.BENIGN,
            answer=str(row["response"]).strip(),
        )


def read_pairs(split: str, side: str, label: Label) -> Callable[[str], Iterator[Row]]:
    """Reader of one side of aligned rows, `{split: [{side: text, ...}, ...]}`."""

    def read(text: str) -> Iterator[Row]:
        for number, row in enumerate(json.loads(text)[split]):
            yield Row(id=f"{split}/{side}/{number}", prompt=row[side].strip(), label=label)

    return read


def read_phrases(text: str) -> Iterator[Row]:
    """`{side: [phrase, ...]}`: beginnings of answers, the side as category."""
    for side, phrases in json.loads(text).items():
        for number, phrase in enumerate(phrases):
            yield Row(id=f"{side}/{number}", prompt=phrase, label=Label.PHRASE, category=side)


def read_coconot(text: str) -> Iterator[Row]:
    """Safety prompts are harmful, the other four categories want noncompliance for another reason."""
    for row in _records(text):
        label = Label.HARMFUL if row["category"] == "Requests with safety concerns" else Label.NONCOMPLIANCE
        yield Row(id=row["id"], prompt=row["prompt"].strip(), label=label, category=row["category"])
