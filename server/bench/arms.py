"""Arms: what is compared with what in the engine's matrix, and what is asked of it. Knows nothing of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from server.bench.drawn import EVERY_LAYER, GATE_PROFILE, LOW_RANKS, STRONGEST, direction_name, low_rank_name
from server.bench.shapes import Shape
from steering.bundle import Bundle
from steering.errors import OperatorError
from steering.plan import GateOrder, Plan

DISTINCT = (8, 64, 256)
"""Different pairs of edit and strength in one batch; 1 is what they are compared with."""


class Served(StrEnum):
    """The engines: vLLM as it comes, with the op at the middle layer alone, and with the op at every layer."""

    STOCK = "stock vLLM"
    ONE = "op at one layer"
    ALL = "op at all layers"


class Metric(StrEnum):
    """What a pair compares.

    `THROUGHPUT` is tokens per second of a whole round, prompts and all; `PACE` seconds between two tokens of
    a request once all requests have their first, so that what is paid once per request is not in it; `FIRST` the
    median of seconds to the first token of requests that come one after the other.
    """

    THROUGHPUT = "throughput"
    PACE = "time per token"
    FIRST = "first token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the requests of a round ask for.

    Attributes:
        edit: for all of them; None where they differ or a gate decides.
        distinct: different pairs of edit and strength.
        is_gated: a gate decides, by the hard sign, so that every request is edited.
    """

    edit: str | None = None
    distinct: int = 1
    is_gated: bool = False

    def plans(self, bundle: Bundle, count: int) -> list[Plan]:
        """Plans of `count` requests."""
        if self.is_gated:
            order = GateOrder(profile=GATE_PROFILE, comply_below=0.5, refuse_above=0.5)
            return [Plan(id=f"bench-{n}", bundle=bundle.digest, gate=order, strength=1.0) for n in range(count)]
        return [
            Plan(
                id=f"bench-{number}",
                bundle=bundle.digest,
                edit=self.edit or direction_name(number % self.distinct),
                strength=1.0 if self.edit else STRONGEST * (0.5 + (number % self.distinct + 1) / self.distinct / 2),
            )
            for number in range(count)
        ]

    def layers(self, bundle: Bundle) -> list[int]:
        """Layers at which a round must have edited; all edits of a drawn bundle are at the same ones."""
        name = self.edit or direction_name(0)
        return [terms.layer for terms in bundle.edits[name].layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An engine and what it is asked for; unsteered where that is nothing."""

    engine: Served
    work: Work | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an arm must reach, on the model and the machine the target was set for.

    Attributes:
        cpu: least ratio of throughput with the demo on a CPU.
        gpu: greatest ratio of time per token with the 8B shape on a GPU.
        gpu_first: greatest ratio of the time to the first token there, for prompts of `LONG` tokens.
    """

    cpu: float | None = None
    gpu: float | None = None
    gpu_first: float | None = None


LONG = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One comparison.

    Attributes:
        name: of what is judged.
        side: that.
        reference: what it is compared with, in the same pair.
        against: its name.
        asked: of the ratio.
    """

    name: str
    side: Side
    reference: Side = Side(engine=Served.STOCK)
    against: str = Served.STOCK.value
    asked: Asked = field(default_factory=Asked)

    @property
    def title(self) -> str:
        """`this ÷ that`."""
        return f"{self.name} ÷ {self.against}"

    def fits(self, batch: int) -> bool:
        """A batch of fewer requests cannot have that many different ones."""
        return self.side.work is None or self.side.work.distinct <= batch

    def bounds(self, metric: Metric, *, shape: Shape | None, prompt: int, is_gpu: bool) -> dict[str, float]:
        """Least or greatest ratio asked, as `report.ratio_of` takes it; nothing where the target is of another case."""
        if metric is Metric.THROUGHPUT and shape is Shape.DEMO and not is_gpu and self.asked.cpu is not None:
            return {"target": self.asked.cpu}
        if shape is Shape.LLAMA3_8B and is_gpu:
            if metric is Metric.PACE and self.asked.gpu is not None:
                return {"most": self.asked.gpu}
            if metric is Metric.FIRST and prompt == LONG and self.asked.gpu_first is not None:
                return {"most": self.asked.gpu_first}
        return {}


ONE_EDIT = Work(edit=direction_name(0))

CONTROL = Arm(name="stock vLLM again", side=Side(engine=Served.STOCK))
"""The noise of the method."""

ARMS: tuple[Arm, ...] = (
    Arm(name="all layers, idle", side=Side(engine=Served.ALL), asked=Asked(cpu=0.98, gpu=1.005, gpu_first=1.01)),
    Arm(
        name="all layers",
        side=Side(engine=Served.ALL, work=Work(edit=EVERY_LAYER)),
        asked=Asked(cpu=0.95, gpu=1.03, gpu_first=1.01),
    ),
    Arm(name="idle", side=Side(engine=Served.ONE), asked=Asked(cpu=0.98, gpu=1.005, gpu_first=1.01)),
    Arm(
        name="one layer",
        side=Side(engine=Served.ONE, work=ONE_EDIT),
        asked=Asked(cpu=0.95, gpu=1.01, gpu_first=1.01),
    ),
    *(
        Arm(
            name=f"low rank {rank}",
            side=Side(engine=Served.ONE, work=Work(edit=low_rank_name(rank))),
            asked=Asked(cpu=0.95, gpu_first=1.01),
        )
        for rank in LOW_RANKS
    ),
    Arm(name="gate", side=Side(engine=Served.ONE, work=Work(is_gated=True)), asked=Asked(cpu=0.95, gpu_first=1.01)),
    Arm(
        name="gate",
        side=Side(engine=Served.ONE, work=Work(is_gated=True)),
        reference=Side(engine=Served.ONE, work=ONE_EDIT),
        against="one layer",
        asked=Asked(gpu=1.005),
    ),
    *(
        Arm(
            name=f"{distinct} distinct",
            side=Side(engine=Served.ONE, work=Work(distinct=distinct)),
            reference=Side(engine=Served.ONE, work=ONE_EDIT),
            against="1 distinct",
            asked=Asked(cpu=0.98, gpu=1.01) if distinct == max(DISTINCT) else Asked(),
        )
        for distinct in DISTINCT
    ),
)


def chosen(names: Sequence[str], *, with_control: bool) -> tuple[Arm, ...]:
    """Arms of these names, all of them where none is named.

    Raises:
        OperatorError: there is no arm of a name.
    """
    strange = sorted(set(names) - {arm.name for arm in ARMS})
    if strange:
        known = list(dict.fromkeys(arm.name for arm in ARMS))
        raise OperatorError(f"no arms {strange}; there are {known}")
    found = tuple(arm for arm in ARMS if not names or arm.name in names)
    return (*found, CONTROL) if with_control else found
