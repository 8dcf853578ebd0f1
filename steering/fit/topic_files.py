"""Prompts from files of the operator: one a line, JSON, JSON Lines or CSV.

Knows nothing of the registry of data sets, nor of what prompts are for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steering.errors import PromptFileError

KEY = "prompt"
"""Name of the column or of the key."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order, without empty lines.

    `.csv` needs a column `prompt`, `.jsonl` has objects with `prompt`, or strings, one a line; `.json` a list of them;
    any other ending is text with a prompt on each line.

    Raises:
        PromptFileError: names file and line, what was found and what is needed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from error
    readers = {".csv": _csv, ".json": _json, ".jsonl": _lines_of_json}
    found = list(readers.get(path.suffix.lower(), _lines)(path, text))
    if not found:
        raise PromptFileError(f"{path} holds no prompt; give one a line, or {KEY!r} in JSON Lines, JSON or CSV")
    return found


def _lines(_path: Path, text: str) -> Iterator[str]:
    yield from (line.strip() for line in text.splitlines() if line.strip())


def _lines_of_json(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise PromptFileError(f"{path}:{number} is not JSON ({error})") from error
        yield _prompt(entry, f"{path}:{number}")


def _json(path: Path, text: str) -> Iterator[str]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{path}:{error.lineno} is not JSON ({error.msg})") from error
    if not isinstance(entries, list):
        raise PromptFileError(f"{path} must hold a list of objects with {KEY!r}, it holds {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        yield _prompt(entry, f"{path}, entry {number}")


def _csv(path: Path, text: str) -> Iterator[str]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if KEY not in (table.fieldnames or ()):
            raise PromptFileError(f"{path}:1 has no column {KEY!r}; its columns are {list(table.fieldnames or ())}")
        for row in table:
            if row[KEY] is None or None in row:
                raise PromptFileError(f"{path}:{table.line_num} has another number of fields than the header")
            if row[KEY].strip():
                yield row[KEY].strip()
    except csv.Error as error:
        raise PromptFileError(f"{path}:{table.line_num} is not CSV ({error})") from error


def _prompt(entry: Any, where: str) -> str:
    found = entry.get(KEY) if isinstance(entry, dict) else entry
    if not isinstance(found, str) or not found.strip():
        what = f"keys {sorted(entry)}" if isinstance(entry, dict) else type(entry).__name__
        raise PromptFileError(f"{where} has no text under {KEY!r}; found {what}")
    return found.strip()
