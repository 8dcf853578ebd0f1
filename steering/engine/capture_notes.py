"""Capture notes: which ask each captured residual belongs to, kept beside the shards so that a run can go on.

Knows nothing of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from steering.engine.asks import Ask
from steering.engine.capture_writer import shard_files
from steering.errors import CaptureError
from steering.fit.captured import ASKS


class CaptureNotes:
    """The notes of one folder, and what of it is in files.

    Args:
        folder: of the shards.
        identity: what residuals depend on beside their asks; JSON.
        generated: generated tokens kept.

    Attributes:
        count: asks that captured since the engine started: the next index.

    Raises:
        CaptureError: the folder holds residuals of another model, dtype or number of tokens, or of nobody knows what.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], generated: int) -> None:
        self._path, self._generated = folder / ASKS, generated
        self._identity = {**identity, "generated": generated}
        self._digests: list[str] = []
        self.count = 0
        self.refresh()
        if self._path.is_file():
            try:
                found = json.loads(self._path.read_text(encoding="utf-8"))
                known, self._digests = found["identity"], list(found["asks"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CaptureError(f"{self._path} cannot be read: {error}; name an empty folder") from error
            if known != self._identity:
                raise CaptureError(
                    f"{folder} holds residuals of another model, dtype or number of tokens; name an empty folder"
                )
        elif self._in_files:
            raise CaptureError(f"{folder} holds residuals without {ASKS}, of whatever asks; name an empty folder")

    def indexes(self, asks: Sequence[Ask]) -> list[int | None]:
        """An index for each ask whose residuals are to be kept and are in no file yet; noted before it is returned.

        Raises:
            CaptureError: the folder holds residuals of other asks.
        """
        indexes: list[int | None] = []
        noted = len(self._digests)
        for ask in asks:
            if not ask.capture:
                indexes.append(None)
                continue
            index, digest = self.count, ask.digest(generated=self._generated)
            if index == len(self._digests):
                self._digests.append(digest)
            elif self._digests[index] != digest:
                raise CaptureError(
                    f"ask {index} is not the one whose residuals {self._path.parent} holds; name an empty folder"
                )
            self.count += 1
            indexes.append(None if index in self._in_files else index)
        if len(self._digests) > noted:
            partial = self._path.with_suffix(".part")
            text = json.dumps({"identity": self._identity, "asks": self._digests})
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)
        return indexes

    def refresh(self) -> None:
        """Look which indexes are in files now."""
        self._in_files: set[int] = set()
        for path in shard_files(self._path.parent):
            with safe_open(path, framework="np") as shard:
                self._in_files.update(shard.get_tensor("index").tolist())
