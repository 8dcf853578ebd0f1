"""A control fit: its settings, its presets, and the folder in which resumable stages leave their files.

Knows nothing of what a stage does; `pipeline.py` has their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering import __version__
from steering.errors import OperatorError
from steering.fingerprint import fingerprint_of
from steering.fit.activations import LoadedModel, load_model
from steering.fit.categories import CATEGORIES, PLAIN, SAFETY
from steering.fit.datasets import DataDirectory, find
from steering.fit.directions import TAU
from steering.fit.low_rank import Covariance, Training
from steering.fit.stages import run_stage, stage_tensors

PAPER_LAYER = 18
PAPER_THRESHOLD = 0.535
PAPER_TOP_K = 200
PAPER_DOSES = (4.0, -6.0)
"""P1's constants for tomg-group-umd/zephyr-llama3-8b-sft-refusal-n-contrast-multiple-tokens; refuse, then comply."""


class Preset(StrEnum):
    """Where constants come from: `AUTO` picks them on calibration prompts, `PAPER` takes P1's."""

    AUTO = "auto"
    PAPER = "paper"


class Variant(StrEnum):
    """Where the residuals of a class are read, and what they are contrasted with.

    `P1` is Algorithm 1: on the category token of refused prompts, against `[respond]` after contrast ones. Prompts
    stand in the model's chat template, as they are served; the paper reads them without one.
    `HEADER` reads the last prompt token, where the decision is made, against plainly benign prompts.
    """

    P1 = "p1"
    HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a fit depends on.

    Attributes:
        categories: refusal categories; None takes those the model has tokens for, or all where it has no tokens.
        layer: of the probe and of every edit; None chooses on calibration prompts.
        tau: P1's threshold on coordinates of class means.
        top_k: coordinates a direction keeps; None keeps P1's 200, which is all of a narrower residual.
        most: prompts per class of the vectors at most.
        most_per_set, most_plain, most_templates: prompts of one part of a data set at most, for the probe and the
            covariance; fewer of plain ones and of a family of templates, which differ less.
        without: data sets that are left out, so that they can be tested on.
        has_templates: the project's own template prompts are fitted on as well.
        calibration: calibration prompts of each kind for doses at most.
        gated: calibration prompts of each kind for the gate at most.
        ranged: calibration prompts that are answered in full for the certified range.
        held: prompts of a held plain, political or attack set at most, evenly spaced.
        held_contested: the same for sets of prompts that look harmful or are.
        penalty, head_penalty: scikit-learn's C of the probe and of the category head.
        head_weights: source of fit prompts to a factor on its weight in the category head: everyday instructions are
            the plain prompts that look most like others.
        tells_plain: the category head also tells plain prompts, which the gate then does not steer to comply.
        plain_missed: share of a group of plain calibration prompts that the head may tell as a category to refuse.
        plain_edited: share of such a group that the gate may edit, on either side.
        weights: group of fit prompts to a factor on its weight; see `steering.fit.prompts`.
        false_positive_rate: of the probe's second operating point.
        safety_margin: share of prompts to refuse that the gate may refuse less than the model alone; without any the
            choice of thresholds hangs on single calibration prompts.
        plain_margin: share of plain prompts that the gate may leave unanswered more than the model alone.
        threshold: a hard sign at this probability on both sides instead of chosen thresholds.
        doses: fixed lengths of the refuse and the comply edits instead of chosen ones.
        multiples: doses tried, in units of the norm of the class difference at that layer.
        comply_target: share of refusals that a `comply` dose must remove on calibration prompts.
        refuse_target: share of prompts that a `refuse` dose must have refused on calibration prompts.
        strengths: multipliers of a dose that are tested for the certified range.
        headroom: a dose is lowered until this strength is still certified; of an edit that lowers refusal, of one that
            raises it. The second meets attacks, which are like no calibration prompt.
        most_spoiled: share of answers that a certified strength may spoil, against no steering.
        divergence_budget: mean KL(p_base ‖ p_steer) of the first token on plain prompts that a comply edit may have.
        loss_budgets: by how much a refuse and a comply edit may raise the next-token loss of given answers to plain
            prompts, in nats; comply edits meet plain prompts, refuse edits hardly ever do.
        covariance, epsilon: of the whitening of the low-rank basis.
        training: of the low-rank vector.
        is_scaled: the vector is trained at the length of the class difference instead of P1's strength 1.
        trained: harmful and benign prompts each that it is trained on at most.
        covariance_prompts: benign prompts that the covariance is made of at most. Of fewer than the residual is wide,
            what they do not span counts as hardly varying, which is most of P1's basis.
        p1_sources: sources of the prompts that Algorithms 1 and 2 see; None takes all. A category without any prompt of
            these keeps all of its own.
        null_share: share of directions that count as the benign null space.
        ridge: of the null-space map.
        batch: prompts of one length in one pass at most.
    """

    preset: Preset = Preset.AUTO
    categories: tuple[str, ...] | None = None
    default_category: str = SAFETY
    layer: int | None = None
    tau: float = TAU
    top_k: int | None = None
    most: int = 800
    most_per_set: int = 4000
    most_plain: int = 1000
    most_templates: int = 1000
    without: tuple[str, ...] = ()
    has_templates: bool = True
    calibration: int = 60
    gated: int = 600
    ranged: int = 64
    held: int = 200
    held_contested: int = 2000
    penalty: float = 0.02
    head_penalty: float = 0.05
    head_weights: Mapping[str, float] = field(
        default_factory=lambda: {"cast_conditions/harmless": 4.0, "templates/everyday instruction": 4.0}
    )
    tells_plain: bool = True
    plain_missed: float = 0.01
    plain_edited: float = 0.01
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"coconot/eval": 6.0, "coconot/pref": 6.0, "or_bench_borderline/all": 3.0, "plain": 0.2}
    )
    false_positive_rate: float = 0.05
    safety_margin: float = 0.015
    plain_margin: float = 0.0
    threshold: float | None = None
    doses: tuple[float, float] | None = None
    multiples: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    comply_target: float = 0.9
    refuse_target: float = 0.75
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    headroom: tuple[float, float] = (1.25, 2.0)
    most_spoiled: float = 0.03
    divergence_budget: float = 1.0
    loss_budgets: tuple[float, float] = (1.0, 0.5)
    covariance: Covariance = Covariance.PAPER
    epsilon: float = 1e-4
    training: Training = field(default_factory=lambda: Training(rate=1e-2, epochs=3, batch=16))
    is_scaled: bool = True
    trained: int = 400
    covariance_prompts: int = 4096
    p1_sources: tuple[str, ...] | None = None
    null_share: float = 0.5
    ridge: float = 10.0
    batch: int = 64
    seed: int = 20261122

    @property
    def most_plain_edited(self) -> float | None:
        """`plain_edited`; None where plain prompts are not told, and so are all steered."""
        return self.plain_edited if self.tells_plain else None


QUICK: Mapping[str, Any] = {
    "most": 60,
    "most_per_set": 60,
    "most_plain": 60,
    "has_templates": False,
    "calibration": 10,
    "gated": 40,
    "ranged": 6,
    "held": 10,
    "held_contested": 10,
    "trained": 16,
    "multiples": (0.5, 1.0),
    "strengths": (1.0,),
    "headroom": (1.0, 1.0),
}
"""Settings that try a fit out in a minute; their numbers mean nothing."""


def preset_settings(preset: Preset, **chosen: Any) -> Settings:
    """The settings of a preset, with those fields replaced that the caller chose (None chooses nothing); sets to leave
    out are left out beside the preset's.
    """
    settings = Settings()
    if preset is Preset.PAPER:
        settings = Settings(
            preset=Preset.PAPER,
            layer=PAPER_LAYER,
            top_k=PAPER_TOP_K,
            threshold=PAPER_THRESHOLD,
            tells_plain=False,
            doses=PAPER_DOSES,
            covariance=Covariance.PAPER,
            epsilon=1e-4,
            training=Training(),
            is_scaled=False,
            trained=379,
            covariance_prompts=379,
            p1_sources=("coconot/eval", "coconot/pref"),
            # Sets of the paper's Table 1 that may be fitted on elsewhere.
            without=("advbench", "harmfulqa"),
        )
    told = {name: value for name, value in chosen.items() if value is not None}
    told["without"] = tuple(dict.fromkeys((*settings.without, *told.get("without", ()))))
    return replace(settings, **told)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A model, its data and the folder the stages write to."""

    loaded: LoadedModel
    directory: DataDirectory
    work: Path
    settings: Settings
    say: Callable[[str], None] = print

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Of the model: every stage depends on it."""
        return fingerprint_of(self.loaded.path).model_dump(mode="json")

    @property
    def categories(self) -> tuple[str, ...]:
        """Those of the fit; see `Settings.categories`."""
        if self.settings.categories is not None:
            return self.settings.categories
        return tuple(self.loaded.categories) or CATEGORIES

    @property
    def head_categories(self) -> tuple[str, ...]:
        """Those the category head tells: the refusal categories, and `PLAIN` last."""
        return (*self.categories, PLAIN) if self.settings.tells_plain else self.categories

    def identity(self, name: str, of: Sequence[str] = (), after: Sequence[Mapping[str, Any]] = ()) -> str:
        """Digest of all that a stage depends on: the model, named settings, and the results of earlier stages."""
        fields = asdict(self.settings)
        facts = {
            "stage": name,
            "code": __version__,
            "model": self.fingerprint,
            "dtype": str(self.loaded.model.dtype),
            "categories": self.categories,
            "settings": {key: fields[key] for key in ("seed", *of)},
            "after": [result["digest"] for result in after],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def stage(
        self,
        name: str,
        make: Callable[[], dict[str, Any]],
        *,
        of: Sequence[str] = (),
        after: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """The stage's result: read where it was left for the same model, settings and earlier results, else made.

        Args:
            name: of its files, `<name>.json` and, where `make` gives `tensors`, `<name>.safetensors`.
            make: gives JSON, and optionally `tensors`: a dict of tensors by name.
            of: names of the settings it depends on.
            after: results of the stages it depends on, by their content: one that was made again and came out the same
                keeps what follows.
        """
        return run_stage(self.work, name, self.identity(name, of, after), make, self.say)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors a stage left."""
        return stage_tensors(self.work, name)


def open_fit(
    model: Path,
    data: Path | None,
    work: Path,
    settings: Settings,
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    say: Callable[[str], None] = print,
) -> Fit:
    """Load the model and make sure that it has the layer the settings name.

    Raises:
        OperatorError: no model there, or fewer layers than the settings need.
        DatasetMissing: a set that is to be left out is not in the registry.
    """
    for name in settings.without:
        find(name)
    loaded = load_model(model, settings.categories or CATEGORIES, dtype=dtype, device_map=device_map)
    layers = len(loaded.blocks)
    if settings.layer is not None and not 0 <= settings.layer < layers:
        why = " (the paper's)" if settings.preset is Preset.PAPER and settings.layer == PAPER_LAYER else ""
        raise OperatorError(
            f"layer {settings.layer}{why} needs a model of {settings.layer + 1} layers, {model} has {layers}; "
            f"choose one from 0 to {layers - 1} with --layer, or leave the choice to --preset auto"
        )
    return Fit(loaded=loaded, directory=DataDirectory.resolve(data), work=work, settings=settings, say=say)
