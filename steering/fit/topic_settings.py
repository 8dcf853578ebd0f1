"""What a topic fit depends on, and the constants of P2's Table 1 as presets.

Knows nothing of models beyond their names and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from steering.errors import FitError, UnknownPreset
from steering.fit.ridge import Ridge, RidgeKind
from steering.fit.topic_classes import BAND, LEAST
from steering.fit.topic_directions import Method
from steering.plan import Reasoning, Scope


class TopicPreset(StrEnum):
    """Where constants come from: `AUTO` searches, the others take rows of P2's Table 1, named by their prompts."""

    AUTO = "auto"
    PAPER_CHINA = "paper-china"
    PAPER_EXTENDED = "paper-extended"


class Purpose(StrEnum):
    """Whether a topic's refusals are to be removed, induced, or made ready to be either."""

    REMOVE = "remove"
    INDUCE = "induce"
    BOTH = "both"

    @property
    def removes(self) -> bool:
        """Removal is among it."""
        return self is not Purpose.INDUCE

    @property
    def induces(self) -> bool:
        """Induction is among it."""
        return self is not Purpose.REMOVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Dose:
    """A configuration that is given instead of searched for: top `count` layers, and α (negative removes refusal)."""

    count: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSettings:
    """Everything a topic fit depends on beside its prompts, its model and its judge.

    Attributes:
        scope: positions that ungated edits reach. P2 edits every position; a gate can edit generated ones only.
        reasoning: of a thinking model, edited like its answers, as in P2, or spared: edits begin with the answer.
        category: what the topic is called in the bundle.
        samples, temperature, max_tokens: answers to each prompt, from which its refusal confidence is made. Reasoning
            counts among the tokens of a thinking model.
        tau: temperature of the softmax over the mean log-probabilities of a prompt's answers.
        band, least: half-width of the neutral band, and prompts a class needs.
        methods: directions that are made; the default profile takes the best of them.
        ridge, is_literal: of RMD and WRMD; see `steering.fit.topic_directions`.
        is_centred: projections are measured from the neutral point, not from zero as printed.
        counts: numbers of layers tried; those the depth does not allow are left out.
        alphas: doses tried, without their sign. RMD and WRMD lie where residuals vary little, so that their scales
            are small and their doses large.
        repositions: repositioning edits are tried beside additive ones.
        doses: configurations by method that are given instead of searched for; empty to search.
        removal: share of what there is to remove that an edit must remove: Δc >= removal · (E[c] + 1).
        shift_prompts: answered conversations on which the shift is measured.
        finder_prompts: refused prompts on which removal is measured at most.
        finder_samples: answers to each; 1 is greedy.
        wave: configurations of each method whose removal is measured at once.
        has_gate: a gate is fitted where safety prompts and answered ones allow it.
        penalty: scikit-learn's C of the gate's probe.
        probe_tolerance: the gate's layer is the first whose area under the ROC curve is this close to the best.
        safety_margin: share of harmful prompts that may be refused less.
        plain_margin: share of answered prompts that may be left unanswered more.
        gated: prompts of each kind on which gates and methods are compared at most.
        strengths: multiples of a dose that are tested for the certified range.
        most_spoiled: share of answers that a certified strength may break.
        ranged: prompts answered in full for that.
        most: prompts of one source at most.
        longest: tokens of a prompt at most.
        test_share, calibration_share: of a file's prompts, by a hash of each; of a registered part's fitting rows only
            the first is cut off, since the registry says which rows calibrate.
        bootstrap: rounds of resampling for the stability of vectors.
    """

    preset: TopicPreset = TopicPreset.AUTO
    purpose: Purpose = Purpose.REMOVE
    scope: Scope = Scope.ALL
    reasoning: Reasoning = Reasoning.EDITED
    category: str = "Topic"
    samples: int = 5
    temperature: float = 1.0
    max_tokens: int = 256
    tau: float = 1.0
    band: float = BAND
    least: int = LEAST
    methods: tuple[Method, ...] = tuple(Method)
    ridge: Ridge = field(default_factory=lambda: Ridge(kind=RidgeKind.LEDOIT_WOLF))
    is_literal: bool = False
    is_centred: bool = True
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    alphas: tuple[float, ...] = (0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0, 9.0, 16.0)
    repositions: bool = True
    doses: Mapping[Method, Dose] = field(default_factory=dict)
    removal: float = 0.75
    shift_prompts: int = 128
    finder_prompts: int = 120
    finder_samples: int = 1
    wave: int = 4
    has_gate: bool = True
    penalty: float = 0.02
    probe_tolerance: float = 0.005
    safety_margin: float = 0.0
    plain_margin: float = 0.01
    gated: int = 400
    strengths: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5, 2.0)
    most_spoiled: float = 0.15
    ranged: int = 32
    most: int = 1500
    longest: int = 600
    test_share: float = 0.15
    calibration_share: float = 0.15
    bootstrap: int = 20
    seed: int = 20261122

    def __post_init__(self) -> None:
        if self.reasoning is Reasoning.SPARED and self.scope is not Scope.GENERATED:
            raise FitError(
                f"reasoning is spared by edits that begin after it: --scope must be generated, got {self.scope.value}"
            )


QUICK: Mapping[str, Any] = {
    "most": 80,
    "samples": 2,
    "max_tokens": 24,
    "counts": (1, 2, 4),
    "alphas": (0.25, 0.5, 1.0, 2.0),
    "shift_prompts": 24,
    "finder_prompts": 24,
    "gated": 40,
    "ranged": 8,
    "strengths": (1.0,),
    "bootstrap": 4,
}
"""Settings that try a fit out in a minute or two; their numbers mean little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperModel:
    """A model of P2's Table 1.

    Attributes:
        name: last part of its repository, by which a folder is recognised.
        architecture, width, layers: what its config must say.
        thinks: its answers begin with reasoning.
        doses: configurations by preset and method, the row with the fewest refusals first.
    """

    name: str
    architecture: str
    width: int
    layers: int
    thinks: bool
    doses: Mapping[TopicPreset, Mapping[Method, Dose]]


PAPER_MODELS: tuple[PaperModel, ...] = (
    PaperModel(
        name="Qwen3-4B-Instruct-2507",
        architecture="Qwen3ForCausalLM",
        width=2560,
        layers=36,
        thinks=False,
        doses={TopicPreset.PAPER_EXTENDED: {Method.WRMD: Dose(count=4, alpha=-0.5)}},
    ),
    PaperModel(
        name="Qwen3-4B-Thinking-2507",
        architecture="Qwen3ForCausalLM",
        width=2560,
        layers=36,
        thinks=True,
        doses={TopicPreset.PAPER_EXTENDED: {Method.WRMD: Dose(count=2, alpha=-2.0)}},
    ),
    PaperModel(
        name="Qwen3-Next-80B-A3B-Thinking",
        architecture="Qwen3NextForCausalLM",
        width=2048,
        layers=48,
        thinks=True,
        doses={
            TopicPreset.PAPER_CHINA: {
                Method.RMD: Dose(count=4, alpha=-0.75),
                Method.MD: Dose(count=4, alpha=-0.5),
                Method.WRMD: Dose(count=8, alpha=-0.25),
                Method.WMD: Dose(count=8, alpha=-0.25),
            },
            TopicPreset.PAPER_EXTENDED: {
                Method.WRMD: Dose(count=16, alpha=-0.15),
                Method.WMD: Dose(count=8, alpha=-0.25),
                Method.MD: Dose(count=4, alpha=-1.0),
                Method.RMD: Dose(count=4, alpha=-2.0),
            },
        },
    ),
)
"""P2's models under the names they are published by: the paper's "Qwen3-Next-4B" pair is Qwen3-4B-2507 in its code."""

LAYERS_NOTE = (
    "P2 publishes how many layers are edited and not which: they are the highest ranked ones of this model here, so "
    "that the paper's α is only as good as the two rankings agree"
)


def topic_settings(preset: TopicPreset, *, model: str, fingerprint: Mapping[str, Any], **chosen: Any) -> TopicSettings:
    """The settings of a preset, with those fields replaced that the caller chose (None chooses nothing).

    Args:
        model: name of the model or of its folder.
        fingerprint: its architecture, hidden_size and layers.

    Raises:
        UnknownPreset: a preset of the paper for a model that its Table 1 does not have.
    """
    settings = TopicSettings(preset=preset)
    if preset is not TopicPreset.AUTO:
        known = paper_model(preset, model, fingerprint)
        doses = known.doses[preset]
        settings = TopicSettings(
            preset=preset,
            # P2's code samples 8,192 tokens; reasoning is among them, and cut short it leaves no answer to judge.
            max_tokens=8192 if known.thinks else 2048,
            methods=tuple(doses),
            ridge=Ridge(kind=RidgeKind.ABSOLUTE, value=1e-2),
            is_literal=True,
            is_centred=False,
            repositions=False,
            doses=doses,
        )
    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})


def paper_model(preset: TopicPreset, name: str, fingerprint: Mapping[str, Any]) -> PaperModel:
    """The row of Table 1 that a model is.

    Raises:
        UnknownPreset: it is none, or its config says that it is another model.
    """
    known = [one for one in PAPER_MODELS if preset in one.doses]
    listed = "; ".join(
        f"{one.name} ({', '.join(f'{method} top {dose.count}, α {dose.alpha:g}' for method, dose in told.items())})"
        for one in known
        for told in [one.doses[preset]]
    )
    found = next((one for one in known if one.name.casefold() in name.casefold()), None)
    if found is None:
        raise UnknownPreset(
            f"preset {preset} has no constants for {name!r}; P2's Table 1 has them for {listed}; name one of these by "
            "--paper-model where the folder has another name, or let --preset auto search"
        )
    facts = {"architecture": found.architecture, "hidden_size": found.width, "layers": found.layers}
    wrong = {key: fingerprint.get(key) for key, value in facts.items() if fingerprint.get(key) != value}
    if wrong:
        raise UnknownPreset(
            f"preset {preset} for {found.name} needs {facts}, this model has {wrong}; let --preset auto search instead"
        )
    return found
