"""Asks and answers of an offline engine: what a fit wants of a model, and what came of it.

Knows nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from steering.errors import InvalidSpec
from steering.outcome import Outcome
from steering.plan import GateOrder, Reasoning, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOrder:
    """One edit at one strength.

    Attributes:
        bundle: digest of a loaded bundle.
        edit: its name there.
        strength: multiplier of its calibrated dose; 0 leaves the ask alone, as no order does.
        scope: which positions are edited.
        reasoning: of a thinking model, whether it is edited as well; see `steering.plan.Plan.reasoning`.
    """

    bundle: str
    edit: str
    strength: float = 1.0
    scope: Scope = Scope.ALL
    reasoning: Reasoning = Reasoning.EDITED


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleGate:
    """A gate that decides.

    Attributes:
        bundle: digest of a loaded bundle.
        order: what the gate may decide; names a profile of the bundle.
        strength: of the edit it chooses.
        reasoning: see `EditOrder`.
    """

    bundle: str
    order: GateOrder
    strength: float = 1.0
    reasoning: Reasoning = Reasoning.EDITED


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question to the model.

    Attributes:
        prompt: token ids, the chat template's included.
        answer: token ids of a given answer: nothing is generated, and their log-probabilities come back, edited as they
            would be were they generated.
        samples: how many answers; above 1 needs a temperature.
        temperature: 0 is greedy.
        seed: of the sampling; None draws another one each time.
        max_tokens: of each answer.
        edit, gate: what is edited; both None leaves the ask alone.
        capture: the residuals are kept, of the first sample or of the given answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 64
    edit: EditOrder | None = None
    gate: BundleGate | None = None
    capture: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidSpec("an ask needs a prompt of at least one token")
        if self.answer is not None and (not self.answer or self.samples != 1):
            raise InvalidSpec("a given answer has at least one token, and nothing is sampled beside it")
        if self.samples < 1 or (self.samples > 1 and self.temperature <= 0):
            raise InvalidSpec(f"{self.samples} samples need a temperature above 0: greedy answers are all the same")
        if self.max_tokens < 1:
            raise InvalidSpec(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if self.edit is not None and self.gate is not None:
            raise InvalidSpec("an ask names an edit or a gate, and not both")

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that the model is given."""
        return self.prompt + (self.answer or ())

    def digest(self, *, generated: int) -> str:
        """What the ask's captured residuals depend on, beside the engine."""
        fields = asdict(self)
        fields.pop("capture")
        if not generated:  # residuals of the prompt do not depend on what comes after it
            for name in ("answer", "samples", "temperature", "seed", "max_tokens"):
                fields.pop(name)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One generated answer.

    Attributes:
        logprobs: of each token, under the edit and before the temperature.
        text: without special tokens.
        finish: vLLM's reason: `stop` or `length`.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of an ask.

    Attributes:
        samples: generated answers; none where one was given.
        given: log-probability of each token of the given answer; None where none was.
        outcomes: what was edited, by sample; empty for an ask without an order.
        response: what the response probe makes of each sample, or of the given answer: the probability that it is a
            refusal, None where it has no token that could be read. None without a probe.
    """

    samples: tuple[Sample, ...] = ()
    given: tuple[float, ...] | None = None
    outcomes: tuple[Outcome, ...] = ()
    response: tuple[float | None, ...] | None = None
