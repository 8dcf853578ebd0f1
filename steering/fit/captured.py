"""Captured residuals: what an engine with the plugin wrote while it ran, read one layer at a time.

Rows are in the order of the asks that captured. Knows nothing of vLLM or of what the residuals are for.

Shapes: `N` asks, `D` width of the residual stream, `G` generated tokens kept at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering.engine.capture_writer import shard_files
from steering.errors import CaptureError

ASKS = "asks.json"
"""Written by `steering.engine.offline` before it asks: digests of the asks by index, and what they were asked of."""


class Generated(NamedTuple):
    """Residuals at the first generated tokens.

    Attributes:
        residuals: [N, G, D] float32, 0 where there is no token.
        mask: [N, G] bool, which tokens there are.
    """

    residuals: Tensor
    mask: Tensor


class CapturedShards:
    """The shards of one folder.

    Args:
        folder: as given to the engine in `CaptureSettings`.
        count: of the asks, N; None takes what the engine noted there, or else the highest index in the shards.

    Attributes:
        layers: that were captured.
        width: D.
        generated_tokens: G; 0 where only the last prompt token was kept.

    Raises:
        CaptureError: no shards, an unreadable one, or some ask is in none: the capture was interrupted.
    """

    def __init__(self, folder: Path, *, count: int | None = None) -> None:
        self._folder = folder
        self._files: list[tuple[Path, Tensor]] = []
        facts: dict[str, str] = {}
        for path in shard_files(folder):
            try:
                with safe_open(path, framework="pt") as shard:
                    facts = shard.metadata() or {}
                    self._files.append((path, shard.get_tensor("index")))
            except (OSError, SafetensorError) as error:
                raise CaptureError(f"{path} cannot be read: {error}; remove it and capture again") from error
        if not self._files:
            raise CaptureError(f"no captured residuals in {folder}; nothing was captured, or it was interrupted early")
        self.layers: tuple[int, ...] = tuple(json.loads(facts["layers"]))
        self.width, self.generated_tokens = int(facts["width"]), int(facts["generated"])
        found = {index for _, indexes in self._files for index in indexes.tolist()}
        self.count = count if count is not None else (_noted(folder) or max(found) + 1)
        missing = sorted(set(range(self.count)) - found)
        if missing:
            raise CaptureError(
                f"{folder} lacks {len(missing)} of {self.count} asks, the first is {missing[0]}; the capture was "
                "interrupted: run it again, it goes on"
            )

    def layer(self, layer: int) -> Tensor:
        """Residuals [N, D] float32 at the last prompt token and the output of one block, before the block's own edit.

        Raises:
            CaptureError: the layer was not captured, or a residual is not finite.
        """
        return self._read(f"layer.{layer}", layer, torch.empty(self.count, self.width))

    def generated(self, layer: int) -> Generated:
        """Residuals at the first generated tokens.

        Raises:
            CaptureError: nothing of the kind was captured, or a residual is not finite.
        """
        tokens = self.generated_tokens
        if not tokens:
            raise CaptureError(f"{self._folder} holds no generated tokens; capture with generated=1 or more")
        mask = torch.zeros(self.count, tokens, dtype=torch.bool)
        for path, index in self._files:
            with safe_open(path, framework="pt") as shard:
                part = shard.get_tensor("mask")
            mask[index[index < self.count]] = part[index < self.count]
        residuals = self._read(f"generated.{layer}", layer, torch.zeros(self.count, tokens, self.width))
        return Generated(residuals, mask)

    def _read(self, name: str, layer: int, result: Tensor) -> Tensor:
        if layer not in self.layers:
            raise CaptureError(f"layer {layer} was not captured in {self._folder}; captured: {list(self.layers)}")
        for path, index in self._files:
            with safe_open(path, framework="pt") as shard:
                part = shard.get_tensor(name)
            result[index[index < self.count]] = part[index < self.count]
        strange = (~torch.isfinite(result)).flatten(1).any(1).nonzero().flatten().tolist()
        if strange:
            raise CaptureError(
                f"{len(strange)} of {self.count} residuals at layer {layer} are not finite, the first is that of ask "
                f"{strange[0]}; the model overflows in this dtype, or its weights are broken"
            )
        return result


def _noted(folder: Path) -> int | None:
    """How many asks the engine noted; None where no engine did, as under plain `vllm serve`."""
    try:
        return len(json.loads((folder / ASKS).read_text(encoding="utf-8"))["asks"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaptureError(f"{folder / ASKS} cannot be read: {error}") from error
