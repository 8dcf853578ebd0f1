"""P1 fitted on a model with refusal tokens: categorical directions, their layer and doses, and the bundle.

Stages, each of which leaves a file in the work folder and is skipped when that file is there for the same settings:

    means    class means at every block, for both variants          means.safetensors, means.json
    sweep    one category's direction at every layer and dose       sweep-<variant>.json
    doses    each category's two doses at the chosen layer          doses-<variant>.json
    range    strengths at which answers stay well formed            range.json
    held     what the edits do on held prompts, with a control      held.json
    bundle   manifest, tensors, report and picture                  the bundle's folder

Layer, doses and ranges are chosen on calibration parts; held prompts are only reported on. Knows nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering.errors import OperatorError
from steering.fit.activations import LoadedModel, greedy, last_residuals, load_model, require_tokens
from steering.fit.catalog import Label, Use
from steering.fit.categories import CATEGORIES, SAFETY, refusal_category
from steering.fit.datasets import DataDirectory, Record, deduplicate, fit_records, held_records
from steering.fit.directions import TAU, ClassMean, difference, random_direction, unit
from steering.fit.intervals import Rate
from steering.fit.outcomes import Outcomes, decide
from steering.terms import Edit, added_direction

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
    strengths: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5)
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


# --- means -----------------------------------------------------------------------------------------------------------


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


# --- sweep and doses -------------------------------------------------------------------------------------------------


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


def added(name: str, layer: int, direction: Tensor, coefficient: float) -> Edit:
    """An edit that adds `coefficient · direction` at one layer."""
    return Edit(name=name, layers=(added_direction(layer=layer, direction=direction, coefficient=coefficient),))


def sweep(fit: Fit, means: Mapping[str, Tensor], variant: Variant) -> dict[str, Any]:
    """The default category's direction at every layer and dose, in both signs, and the layer that controls best.

    `comply` is tried on borderline prompts (most are refused), `refuse` on plain ones (most are answered).
    """

    def make() -> dict[str, Any]:
        prompts = calibration_prompts(fit)
        before, plain = decide(fit.loaded, prompts.borderline), decide(fit.loaded, prompts.plain)
        norms = torch.linalg.vector_norm(last_residuals(fit.loaded, prompts.borderline), dim=-1).median(dim=0).values
        layers = []
        for layer in range(len(fit.loaded.blocks)):
            direction, gap = categorical(means, variant, fit.settings.default_category, layer, fit.settings)
            comply = _doses(fit, layer, direction, -gap, prompts.borderline, before)
            refuse = _doses(fit, layer, direction, gap, prompts.plain, plain)
            best = {
                "comply": _choose(comply, fit.settings.comply_target),
                "refuse": _choose(refuse, fit.settings.refuse_target),
            }
            layers.append(
                {
                    "layer": layer,
                    "gap": gap,
                    "residual_norm": float(norms[layer]),
                    "comply": comply,
                    "refuse": refuse,
                    "chosen": best,
                    "score": best["comply"]["effect"] + best["refuse"]["effect"],
                }
            )
            fit.say(f"  layer {layer}: comply {best['comply']['effect']:.2f}, refuse {best['refuse']['effect']:.2f}")
        # As in Arditi et al.: what the last fifth of the blocks does is too close to the output to count as control.
        candidates = [row for row in layers if int(str(row["layer"])) < max(1.0, 0.8 * len(layers))]
        return {
            "unsteered": {"borderline": before.refusals.to_json(), "plain": plain.refusals.to_json()},
            "layers": layers,
            "layer": _best_layer(candidates),
        }

    return fit.stage(f"sweep-{variant}", make)


def calibrated_doses(fit: Fit, means: Mapping[str, Tensor], variant: Variant, layer: int) -> dict[str, Any]:
    """For each category the smallest dose of either sign that reaches its target at the chosen layer."""

    def make() -> dict[str, Any]:
        prompts = calibration_prompts(fit)
        plain = decide(fit.loaded, prompts.plain)
        result: dict[str, Any] = {}
        for name in fit.settings.categories:
            direction, gap = categorical(means, variant, name, layer, fit.settings)
            concerned = prompts.own[name]
            before = decide(fit.loaded, concerned)
            comply = _choose(_doses(fit, layer, direction, -gap, concerned, before), fit.settings.comply_target)
            refuse = _choose(_doses(fit, layer, direction, gap, prompts.plain, plain), fit.settings.refuse_target)
            named = decide(fit.loaded, prompts.plain, added("dose", layer, direction, refuse["coefficient"]))
            result[name] = {
                "gap": gap,
                "comply": comply,
                "refuse": {**refuse, "named": named.agreement([name] * len(prompts.plain)).to_json()},
            }
            fit.say(
                f"  {name}: comply {comply['coefficient']:.1f} (effect {comply['effect']:.2f}), "
                f"refuse {refuse['coefficient']:.1f} (effect {refuse['effect']:.2f})"
            )
        return {"layer": layer, "categories": result}

    return fit.stage(f"doses-{variant}", make)


def _doses(
    fit: Fit, layer: int, direction: Tensor, signed_gap: float, prompts: Sequence[list[int]], before: Outcomes
) -> list[dict[str, Any]]:
    """Outcomes at each multiple of the gap; `effect` is refusals removed (negative sign) or prompts refused."""
    rows = []
    for multiple in fit.settings.multiples:
        coefficient = multiple * signed_gap
        outcomes = decide(fit.loaded, prompts, added("dose", layer, direction, coefficient))
        rate = outcomes.refusals
        if signed_gap < 0:
            effect = 1.0 - rate.count / before.refusals.count if before.refusals.count else 0.0
        else:
            effect = rate.value
        malformed = outcomes.malformed
        rows.append(
            {
                "multiple": multiple,
                "coefficient": coefficient,
                "refused": rate.to_json(),
                "malformed": malformed.to_json(),
                "effect": effect - malformed.value,
            }
        )
    return rows


def _choose(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """The smallest dose whose effect reaches the target, else the one with the largest effect."""
    for row in rows:
        if row["effect"] >= target:
            return row
    return max(rows, key=lambda row: row["effect"])


def _best_layer(layers: Sequence[dict[str, Any]]) -> int:
    """The layer with the best sum of both effects, to two places; among equals the one with the smaller addition."""

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        largest = max(abs(row["chosen"][sign]["coefficient"]) for sign in ("comply", "refuse"))
        return round(row["score"], 2), -largest / row["residual_norm"]

    return int(max(layers, key=rank)["layer"])


# --- range and held --------------------------------------------------------------------------------------------------


def edits_of(fit: Fit, means: Mapping[str, Tensor], doses: Mapping[Variant, Mapping[str, Any]]) -> dict[str, Edit]:
    """A refuse and a comply edit for each variant and category, and `random`, all at strength 1."""
    edits: dict[str, Edit] = {}
    for variant in Variant:
        layer = int(doses[variant]["layer"])
        for name in fit.settings.categories:
            direction, _ = categorical(means, variant, name, layer, fit.settings)
            for purpose in ("refuse", "comply"):
                key = edit_name(purpose, name, variant)
                edits[key] = added(key, layer, direction, doses[variant]["categories"][name][purpose]["coefficient"])
    chosen = doses[Variant.HEADER]
    size = abs(chosen["categories"][fit.settings.default_category]["comply"]["coefficient"])
    direction = random_direction(fit.loaded.width, fit.settings.seed)
    edits["random"] = added("random", int(chosen["layer"]), direction, size)
    return edits


def edit_name(purpose: str, category: str, variant: Variant = Variant.HEADER) -> str:
    """`refuse-requests-with-safety-concerns`, and `p1-refuse-...` for Algorithm 1 as printed."""
    prefix = "p1-" if variant is Variant.P1 else ""
    return f"{prefix}{purpose}-{category.lower().replace(' ', '-')}"


def certified_range(fit: Fit, edits: Mapping[str, Edit]) -> dict[str, Any]:
    """For each edit the share of well-formed answers at each strength, and the largest strength certified.

    An answer is well formed when it begins with a refusal token or `[respond]` and holds no run of four tokens three
    times. A small model repeats itself unsteered too, so a strength is held against that.
    """

    def make() -> dict[str, Any]:
        prompts = calibration_prompts(fit)
        tested = of_common_length(prompts.borderline + prompts.harmful, fit.settings.ranged)
        plain = well_formed(fit.loaded, greedy(fit.loaded, tested, new_tokens=32))
        result: dict[str, Any] = {}
        for name, edit in edits.items():
            maximum, rates = 0.0, {}
            for strength in fit.settings.strengths:
                rate = well_formed(fit.loaded, greedy(fit.loaded, tested, edit, strength, new_tokens=32))
                rates[f"{strength:g}"] = rate.to_json()
                if rate.value < plain.value - fit.settings.most_spoiled:
                    break
                maximum = strength
            result[name] = {"maximum": maximum, "well_formed": rates}
            fit.say(f"  {name}: strength up to {maximum:g}")
        return {"unsteered": plain.to_json(), "edits": result, "prompts": len(tested)}

    return fit.stage("range", make)


def of_common_length(prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """At most `most` prompts from the largest groups of equal length, which are generated together."""
    counts = Counter(len(prompt) for prompt in prompts)
    return sorted(prompts, key=lambda prompt: (-counts[len(prompt)], len(prompt)))[:most]


def well_formed(loaded: LoadedModel, answers: Sequence[Sequence[int]]) -> Rate:
    """Share of answers that begin with a decision token and do not run in circles."""
    decisions = {*loaded.categories.values(), loaded.respond}
    good = sum(bool(answer) and answer[0] in decisions and not _circles(answer) for answer in answers)
    return Rate(count=good, n=len(answers))


def _circles(answer: Sequence[int], run: int = 4, times: int = 3) -> bool:
    runs = [tuple(answer[start : start + run]) for start in range(len(answer) - run + 1)]
    return any(runs.count(found) >= times for found in set(runs))


def held_effects(fit: Fit, edits: Mapping[str, Edit]) -> dict[str, Any]:
    """Refusals on held prompts: unsteered, under the default category's two edits, and under random directions."""

    def make() -> dict[str, Any]:
        held = deduplicate(held_records(fit.directory)).records
        comply = edits[edit_name("comply", fit.settings.default_category)]
        refuse = edits[edit_name("refuse", fit.settings.default_category)]
        control = edits["random"]
        result: dict[str, Any] = {}
        for name, part in (
            ("XSTest safe", ("xstest", "safe")),
            ("XSTest unsafe", ("xstest", "unsafe")),
            ("CoCoNot contrast", ("coconot", "contrast")),
            ("JailbreakBench benign", ("jailbreakbench", "benign")),
            ("JailbreakBench harmful", ("jailbreakbench", "harmful")),
            ("OR-Bench borderline, held part", ("or_bench_borderline", "all")),
            ("GSM8K test", ("gsm8k", "test")),
        ):
            records = [record for record in held if (record.dataset, record.part) == part]
            prompts = fit.loaded.prompts([record.prompt for record in records[:200]])
            arms: dict[str, Rate] = {
                "unsteered": decide(fit.loaded, prompts).refusals,
                "comply": decide(fit.loaded, prompts, comply).refusals,
                "refuse": decide(fit.loaded, prompts, refuse).refusals,
            }
            for label, coefficient in (("random", 1.0), ("random, other sign", -1.0)):
                arms[label] = decide(fit.loaded, prompts, control, coefficient).refusals
            for purpose in ("comply", "refuse"):
                printed = edits[edit_name(purpose, fit.settings.default_category, Variant.P1)]
                arms[f"P1 {purpose}"] = decide(fit.loaded, prompts, printed).refusals
            result[name] = {arm: rate.to_json() for arm, rate in arms.items()}
            fit.say(f"  {name}: " + ", ".join(f"{arm} {rate.value:.3f}" for arm, rate in arms.items()))
        return {"sets": result, "controls": _controls(fit, control, comply)}

    return fit.stage("held", make)


def _controls(fit: Fit, control: Edit, comply: Edit, seeds: int = 10) -> dict[str, Any]:
    """XSTest safe under ten random directions of the norm of the `comply` edit: the control is not one draw."""
    records = fit.directory.load("xstest", "safe", Use.TEST)
    prompts = fit.loaded.prompts([record.prompt for record in records])
    layer, size = control.layers[0].layer, float(comply.layers[0].bias[0].abs())
    rates = [
        decide(
            fit.loaded,
            prompts,
            added("random", layer, random_direction(fit.loaded.width, fit.settings.seed + 1 + seed), size),
        ).refusals.value
        for seed in range(seeds)
    ]
    return {"set": "XSTest safe", "refused": [round(rate, 4) for rate in rates], "mean": round(sum(rates) / seeds, 4)}


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
