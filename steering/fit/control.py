"""P1 fitted on a model with refusal tokens: categorical directions, their layer and doses, and the bundle.

Stages, each of which leaves a file in the work folder and is skipped when that file is there for the same settings:

    means    class means at every block, for both variants          means.safetensors, means.json
    sweep    one category's direction at every layer and dose       sweep-<variant>.json
    doses    each category's two doses at the chosen layer          doses-<variant>.json
    range    strengths at which answers stay well formed            range.json
    settled  doses lowered to what the ranges allow, measured again settled.json
    held     what the edits do on held prompts, with a control      held.json
    bundle   manifest, tensors, report and picture                  the bundle's folder

Layer, doses and ranges are chosen on calibration parts; held prompts are only reported on. Knows nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering.errors import OperatorError
from steering.fit.activations import LoadedModel, last_residuals, load_model, require_tokens
from steering.fit.categories import CATEGORIES, SAFETY, refusal_category
from steering.fit.datasets import DataDirectory, Record, fit_records
from steering.fit.directions import TAU, ClassMean, difference, unit
from steering.fit.sources import Label, Use

REFUSED_PARTS: tuple[tuple[str, str], ...] = (
    ("coconot", "eval"),
    ("catqa", "all"),
    ("harmfulqa", "harmfulqa"),
    ("harmfulqa", "dangerousqa"),
    ("advbench", "all"),
    ("ailuminate_demo", "all"),
    ("cast_conditions", "harmful"),
    ("ccp_sensitive", "train"),
    ("deccp", "censored"),
)
CONTRAST_PARTS: tuple[tuple[str, str], ...] = (("coconot", "pref"), ("or_bench_borderline", "all"))
"""Prompts to answer that look like those to refuse: P1 takes CoCoNot's contrast set, which is for testing here."""

PLAIN_PARTS: tuple[tuple[str, str], ...] = (
    ("gpteacher", "roleplay"),
    ("gpteacher", "codegen"),
    ("cast_conditions", "harmless"),
    ("gsm8k", "train"),
)
"""Plainly benign prompts with answers."""

RESPOND = "[respond]"


class Variant(StrEnum):
    """Where the residuals of a class are read, and what they are contrasted with.

    `P1` is Algorithm 1 as printed: on the category token of refused prompts, against `[respond]` after contrast ones.
    `HEADER` reads the last prompt token, where the decision is made, against plainly benign prompts.
    """

    P1 = "p1"
    HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a fit depends on.

    Attributes:
        tau: P1's threshold on coordinates of class means.
        top_k: coordinates a direction keeps; None keeps 200, P1's value, which is all of a narrower residual.
        most: prompts per class at most.
        calibration: calibration prompts of each kind at most.
        ranged: calibration prompts that are answered in full for the certified range.
        multiples: doses tried, in units of the norm of the class difference at that layer.
        comply_target: share of refusals that a `comply` dose must remove on calibration prompts.
        refuse_target: share of prompts that a `refuse` dose must have refused on calibration prompts.
        strengths: multipliers of a dose that are tested for well-formed answers.
        headroom: a dose is lowered until this strength is still certified.
        most_spoiled: share of answers that a certified strength may spoil, against no steering.
    """

    categories: tuple[str, ...] = CATEGORIES
    default_category: str = SAFETY
    tau: float = TAU
    top_k: int | None = None
    most: int = 800
    calibration: int = 60
    ranged: int = 32
    multiples: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    comply_target: float = 0.9
    refuse_target: float = 0.75
    strengths: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5)
    headroom: float = 1.25
    most_spoiled: float = 0.15
    seed: int = 20261122


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """A model, its data and the folder the stages write to."""

    loaded: LoadedModel
    directory: DataDirectory
    work: Path
    settings: Settings
    say: Callable[[str], None] = print

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result: read where it was left for the same settings and weights, else made and left there."""
        path = self.work / f"{name}.json"
        identity = self.identity
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("identity") == identity:
                self.say(f"{name}: kept from {path}")
                return kept
        self.say(f"{name}: running")
        made = {"identity": identity, **make()}
        self.work.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(path)
        # What a later stage reads must be what a resumed run would read: floats and keys as JSON has them.
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    @property
    def identity(self) -> str:
        """Digest of the settings and of the weights' file sizes and first bytes."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        for weights in sorted(self.loaded.path.glob("*.safetensors")):
            with weights.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def open_fit(model: Path, data: Path | None, work: Path, settings: Settings, say: Callable[[str], None] = print) -> Fit:
    """Load the model and make sure it has a token for each category."""
    loaded = load_model(model, settings.categories)
    require_tokens(loaded, settings.categories)
    return Fit(loaded=loaded, directory=DataDirectory.resolve(data), work=work, settings=settings, say=say)


def class_means(fit: Fit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Mean residuals [L, D] float64: `<variant>/<category>`, and `<variant>/[respond]`, which they are held against."""
    path = fit.work / "means.safetensors"

    def make() -> dict[str, Any]:
        refused = fit_records(fit.directory, REFUSED_PARTS)
        contrast = fit_records(fit.directory, CONTRAST_PARTS)
        plain = fit_records(fit.directory, PLAIN_PARTS)
        classes = {
            name: _sample([record for record in refused.records if refusal_category(record) == name], fit.settings)
            for name in fit.settings.categories
        }
        against = {
            Variant.P1: _sample(contrast.records, fit.settings),
            Variant.HEADER: _sample(plain.records, fit.settings),
        }
        means: dict[str, Tensor] = {}
        for variant in Variant:
            for name, records in {**classes, RESPOND: against[variant]}.items():
                means[f"{variant}/{name}"] = _mean(fit, records, name if variant is Variant.P1 else None)
        fit.work.mkdir(parents=True, exist_ok=True)
        save_file(means, path)
        named = {**classes, **{f"{variant}/{RESPOND}": records for variant, records in against.items()}}
        return {
            "prompts": {name: len(records) for name, records in named.items()},
            "sources": {name: _sources(records) for name, records in named.items()},
            "dropped": {**refused.dropped, **contrast.dropped, **plain.dropped},
        }

    if not path.is_file():
        (fit.work / "means.json").unlink(missing_ok=True)
    facts = fit.stage("means", make)
    return load_file(path), facts


def _mean(fit: Fit, records: Sequence[Record], name: str | None) -> Tensor:
    """Mean residual [L, D] at the last prompt token, or on the token of `name` appended to the prompt."""
    token = {**fit.loaded.categories, RESPOND: fit.loaded.respond}[name] if name is not None else None
    suffix = [] if token is None else [token]
    mean = ClassMean()
    for start in range(0, len(records), 256):
        prompts = fit.loaded.prompts([record.prompt for record in records[start : start + 256]])
        mean.add(last_residuals(fit.loaded, [[*prompt, *suffix] for prompt in prompts]))
    return mean.mean


def categorical(
    means: Mapping[str, Tensor], variant: Variant, category: str, layer: int, settings: Settings
) -> tuple[Tensor, float]:
    """The unit direction [D] of a category at a layer, and the norm of the difference before it was normalised."""
    refused, answered = means[f"{variant}/{category}"][layer], means[f"{variant}/{RESPOND}"][layer]
    raw = difference(refused, answered, tau=settings.tau, top_k=settings.top_k)
    return unit(raw), float(torch.linalg.vector_norm(raw))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Token ids of calibration prompts: disjoint from what was fitted on and from what is held.

    Attributes:
        borderline: prompts that should be answered but are mostly refused.
        harmful: prompts that should be refused.
        plain: prompts that are mostly answered.
        own: per category the prompts it concerns: its noncompliance prompts, and borderline ones.
    """

    borderline: list[list[int]]
    harmful: list[list[int]]
    plain: list[list[int]]
    own: dict[str, list[list[int]]]


def calibration_prompts(fit: Fit) -> Calibration:
    """Prompts of the calibration parts, tokenized."""
    most = fit.settings.calibration
    left = fit_records(fit.directory, (*REFUSED_PARTS, *CONTRAST_PARTS, *PLAIN_PARTS), Use.CALIBRATE).records
    kinds = {
        "borderline": [record for record in left if record.dataset == "or_bench_borderline"],
        "harmful": [record for record in left if record.label is Label.HARMFUL],
        "plain": [record for record in left if record.label is Label.BENIGN],
    }
    own = {
        name: [record for record in left if refusal_category(record) == name and record.label is not Label.HARMFUL]
        for name in fit.settings.categories
    }

    def ids(records: Sequence[Record]) -> list[list[int]]:
        return fit.loaded.prompts([record.prompt for record in _sample(records, fit.settings, most)])

    return Calibration(
        **{kind: ids(records) for kind, records in kinds.items()},
        own={name: ids(records) for name, records in own.items()},
    )


def _sample(records: Sequence[Record], settings: Settings, most: int | None = None) -> list[Record]:
    """At most `most` records in an order given by a hash of their keys: the same on every machine."""
    ordered = sorted(records, key=lambda record: hashlib.sha256(f"{settings.seed}/{record.key}".encode()).digest())
    if not ordered:
        raise OperatorError("a class of the fit has no prompts in the data directory; check the registry's sets")
    return ordered[: settings.most if most is None else most]


def _sources(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        name = f"{record.dataset}/{record.part}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
