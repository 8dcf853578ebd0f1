"""Doses of directions: the layer and length that control a model's decision and leave its answers well formed.

Chosen on calibration prompts, reported on held ones. Knows nothing of bundles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.fit.activations import LoadedModel, greedy, last_residuals
from steering.fit.control import Fit, Variant, calibration_prompts, categorical
from steering.fit.datasets import deduplicate, held_records, thinned
from steering.fit.directions import random_direction
from steering.fit.intervals import Rate
from steering.fit.outcomes import Outcomes, decide
from steering.fit.sources import Use
from steering.terms import Edit, added_direction

HELD_PROMPTS = 250
"""Prompts of a held set that are reported on at most, evenly spaced: all of XSTest's safe and unsafe ones."""


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


def edits_of(fit: Fit, means: Mapping[str, Tensor], doses: Mapping[str, Mapping[str, Any]]) -> dict[str, Edit]:
    """A refuse and a comply edit for each variant and category, and `random`, all at strength 1.

    Args:
        doses: by variant, what `calibrated_doses` or `settled_doses` gave.
    """
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


def settled_doses(
    fit: Fit, means: Mapping[str, Tensor], doses: Mapping[str, Mapping[str, Any]], ranges: Mapping[str, Any]
) -> dict[str, Any]:
    """The doses, each lowered until strength `headroom` is certified, with their effects measured again.

    A dose that controls the first token may be too much for the tokens after it, since every one of them is edited. An
    edit that spoils answers at every strength tried is left out: its `maximum` is 0.
    """

    def make() -> dict[str, Any]:
        prompts = calibration_prompts(fit)
        result: dict[str, Any] = {}
        for variant in Variant:
            layer, categories = int(doses[variant]["layer"]), doses[variant]["categories"]
            settled: dict[str, Any] = {}
            for name in fit.settings.categories:
                direction, _ = categorical(means, variant, name, layer, fit.settings)
                settled[name] = {}
                for purpose, concerned in (("comply", prompts.own[name]), ("refuse", prompts.plain)):
                    found = ranges["edits"][edit_name(purpose, name, variant)]["maximum"]
                    share = min(1.0, found / fit.settings.headroom)
                    coefficient = share * categories[name][purpose]["coefficient"]
                    edit = added("dose", layer, direction, coefficient)
                    before, after = decide(fit.loaded, concerned), decide(fit.loaded, concerned, edit)
                    settled[name][purpose] = {
                        "coefficient": coefficient,
                        "multiple": share * categories[name][purpose]["multiple"],
                        "maximum": found / share if share else 0.0,
                        "unsteered": before.refusals.to_json(),
                        "refused": after.refusals.to_json(),
                        "malformed": after.malformed.to_json(),
                        "named": after.agreement([name] * len(concerned)).to_json(),
                    }
                fit.say(
                    f"  {variant} {name}: "
                    + ", ".join(
                        f"{purpose} {facts['coefficient']:.1f} ({facts['unsteered']['rate']:.2f} to "
                        f"{facts['refused']['rate']:.2f})"
                        for purpose, facts in settled[name].items()
                    )
                )
            result[variant] = {"layer": layer, "categories": settled}
        return result

    return fit.stage("settled", make)


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
            records = thinned([record for record in held if (record.dataset, record.part) == part], HELD_PROMPTS)
            prompts = fit.loaded.prompts([record.prompt for record in records])
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
