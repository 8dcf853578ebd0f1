"""Cells: a batch and a prompt length, what is asked of an engine there, and the pairs that came of it.

Knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.bench.arms import Metric
from server.bench.report import Ratio, ratio_of
from server.bench.shapes import Shape

FIRST_REQUESTS = 8
"""Of a round that times first tokens; each waits for the one before it, and their median is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator asked for.

    Attributes:
        shape: None for a model folder of the operator's own.
        model: that folder; None for a shape.
        batches, prompts: of the cells, each with each.
        tokens: generated for each request.
        pairs: of rounds per arm and cell.
        peer_pairs: of rounds against each peer, which differs by far more.
        options: vLLM's own.
        arms: names of the arms to run; none for all.
        with_control: also stock vLLM against itself.
        with_peers: also the peers that are installed.
    """

    shape: Shape | None
    model: Path | None = None
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: int
    pairs: int
    peer_pairs: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ()
    with_control: bool = False
    with_peers: bool = True

    @property
    def cells(self) -> list[Cell]:
        """Every batch with every prompt length, and for each of these the first tokens."""
        rounds = [Cell(batch=batch, prompt=prompt) for prompt in self.prompts for batch in self.batches]
        return [*rounds, *(Cell(batch=1, prompt=prompt, is_first=True) for prompt in self.prompts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Where an arm is measured.

    Attributes:
        batch: requests that come at once.
        prompt: tokens of each prompt.
        is_first: only first tokens are timed, of requests that come one after the other.
    """

    batch: int
    prompt: int
    is_first: bool = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What a round tells here."""
        return (Metric.FIRST,) if self.is_first else (Metric.THROUGHPUT, Metric.PACE)

    @property
    def name(self) -> str:
        """For people."""
        return f"prompt {self.prompt}" if self.is_first else f"batch {self.batch}, prompt {self.prompt}"

    @property
    def requests(self) -> int:
        """Of a round."""
        return FIRST_REQUESTS if self.is_first else self.batch

    def shape(self, tokens: int) -> dict[str, Any]:
        """What a resident is asked for."""
        made = 1 if self.is_first else tokens
        return {"requests": self.requests, "length": self.prompt, "tokens": made, "is_one_by_one": self.is_first}

    def kv_tokens(self, tokens: int) -> int:
        """Tokens whose keys and values are held at once."""
        return self.batch * (self.prompt + (1 if self.is_first else tokens))


@dataclass(slots=True, kw_only=True)
class Measured:
    """One metric of one arm in one cell.

    Attributes:
        bounds: what is asked of the ratio, as `report.ratio_of` takes it.
        mine, others: rates or times of the arm and of its reference, pair by pair.
        skipped: why it was not measured.
    """

    arm: str
    against: str
    metric: Metric
    cell: Cell
    bounds: Mapping[str, float]
    mine: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    skipped: str | None = None

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.arm} ÷ {self.against}, {self.cell.name}, {self.metric.value}"

    def add(self, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """One pair of answers; where either has no tokens after the last first one, there is no time per token."""
        pair = [_value(self.metric, answer) for answer in (mine, other)]
        if pair[0] is not None and pair[1] is not None:
            self.mine.append(pair[0])
            self.others.append(pair[1])

    def ratio(self) -> Ratio | None:
        """Of the pairs; None where there are none."""
        if not self.mine:
            return None
        pairs = list(zip(self.mine, self.others, strict=True))
        return ratio_of(self.name, pairs, target=self.bounds.get("target"), most=self.bounds.get("most"))

    def line(self) -> str:
        """For people."""
        if self.skipped is not None:
            return f"{self.name}: skipped, {self.skipped}"
        ratio = self.ratio()
        return f"{self.name}: no pairs" if ratio is None else ratio.line()

    @property
    def facts(self) -> dict[str, Any]:
        """For the report: rates are tokens per second, times are seconds."""
        return {
            "name": self.name,
            "arm": self.arm,
            "against": self.against,
            "metric": self.metric.value,
            "batch": self.cell.batch,
            "requests": self.cell.requests,
            "is_one_by_one": self.cell.is_first,
            "prompt": self.cell.prompt,
            "mine": [float(f"{value:.6g}") for value in self.mine],
            "others": [float(f"{value:.6g}") for value in self.others],
            "skipped": self.skipped,
        }


def _value(metric: Metric, answer: Mapping[str, Any]) -> float | None:
    if metric is Metric.THROUGHPUT:
        return float(answer["tokens"]) / float(answer["seconds"])
    if metric is Metric.FIRST:
        return float(answer["first_seconds"])
    between: float | None = answer["seconds_per_token"]
    return between
