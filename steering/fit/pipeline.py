"""The stages of `trimtab fit control` in their order, from prompts to a bundle with its report.

Each stage leaves `<stage>.json` (and tensors) and a picture in the work folder; one that is there for the same model,
settings and earlier results is not run again. Layers, doses and thresholds are chosen on calibration prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.bundle import Bundle
from steering.fit import pictures
from steering.fit.certified import scaled
from steering.fit.comparison import Setup, compare_stage
from steering.fit.control import Fit, Variant
from steering.fit.control_bundle import CONTROL_PROFILE, P1_PROFILE, PROFILE, Contents, ProfilePlan, write_bundle
from steering.fit.doses import best_layer, certified_ranges, dose_curves, layer_sweep
from steering.fit.families import (
    BENIGN_REFUSAL,
    LOW_RANK,
    NULL_SPACE,
    P1,
    POOLED,
    RANDOM,
    RANDOM_CATEGORY,
    Family,
    another_category,
    families_of,
    random_edits,
    recipes_of,
)
from steering.fit.gating import Readings, gate_stage, token_stage
from steering.fit.held import Gated, held_stage
from steering.fit.learned import low_rank_stage, null_space_stage
from steering.fit.probing import head_stage, probe_of, probe_stage, read
from steering.fit.prompts import calibration_prompts, fitting_prompts, require_classes
from steering.fit.response_stage import response_probe_of, response_stage
from steering.fit.stages import draw_stage
from steering.fit.trials import trials_of
from steering.fit.vectors import activations, categorical, class_means, cosines, pooled, refusal_openings
from steering.fit.vectors import benign_refusal as benign_refusal_direction
from steering.terms import Edit


class Stage(StrEnum):
    """The stages, in order; `--stage` stops after one."""

    ACTIVATIONS = "activations"
    VECTORS = "vectors"
    LAYERS = "layers"
    PROBE = "probe"
    HEAD = "head"
    LOW_RANK = "low_rank"
    NULL_SPACE = "null_space"
    DOSES = "doses"
    GATE = "gate"
    COMPARE = "compare"
    HELD = "held"
    RESPONSE = "response"
    BUNDLE = "bundle"
    REPORT = "report"


@dataclass(kw_only=True)
class _Run:
    """What stages have given so far; `done` says whether to stop."""

    fit: Fit
    until: Stage

    def done(self, stage: Stage, draw: Callable[[Path], None], *results: Mapping[str, Any]) -> None:
        """Draw the stage's picture where its files are newer; raises `_Finished` after the last stage wanted."""
        draw_stage(self.fit.work / f"{stage}.png", draw, *results)
        if self.until is stage:
            raise _Finished


class _Finished(Exception):
    """The last stage that was wanted has run."""


def fit_control(fit: Fit, bundle: Path, *, name: str, version: str, until: Stage = Stage.REPORT) -> Bundle | None:
    """Run the stages up to `until`, and write the bundle where that is among them; None where it is not."""
    try:
        return _run(_Run(fit=fit, until=until), bundle, name=name, version=version)
    except _Finished:
        return None


def _run(run: _Run, bundle: Path, *, name: str, version: str) -> Bundle:
    fit = run.fit
    fitting, calibrating = fitting_prompts(fit), calibration_prompts(fit)
    require_classes(fitting, fit.categories)
    residuals = activations(fit, fitting, calibrating)
    base = residuals.facts
    run.done(Stage.ACTIVATIONS, lambda path: pictures.norms(base, path), base)

    openings, opening_facts = refusal_openings(fit, fitting, [base])
    if not openings.is_tokens:
        draw_stage(fit.work / "openings.png", lambda path: pictures.openings(opening_facts, path), opening_facts)
    means, vector_facts = class_means(fit, openings, fitting, residuals.fitting, [base, opening_facts])
    run.done(Stage.VECTORS, lambda path: pictures.vectors(means, fit, path), vector_facts)

    trials = cache(lambda: trials_of(fit, openings, calibrating))
    variants = [Variant.HEADER, *([Variant.P1] if openings.is_tokens else [])]
    swept = {
        variant.value: layer_sweep(fit, openings, means, trials, base["residual_norm"], variant, [vector_facts])
        for variant in variants
    }
    layer = int(swept[Variant.HEADER]["layer"])
    run.done(Stage.LAYERS, lambda path: pictures.layers(swept[Variant.HEADER], path), *swept.values())

    # A gate may only choose edits that begin at its probe's layer or later.
    probed = probe_stage(fit, residuals, fitting, calibrating, layer, [base, swept["header"]])
    p1_layer = best_layer(swept["p1"], fit.settings, at_least=int(probed["layer"])) if "p1" in swept else None
    run.done(Stage.PROBE, lambda path: pictures.probe(probed, path), probed)
    headed = head_stage(fit, residuals, fitting, calibrating, int(probed["layer"]), [probed])
    run.done(Stage.HEAD, lambda path: pictures.confusion(headed, path), headed)

    trained = low_rank_stage(fit, openings, means, fitting, residuals.fitting, layer, [vector_facts, swept["header"]])
    run.done(Stage.LOW_RANK, lambda path: pictures.training(trained, path), trained)
    mapped = null_space_stage(fit, openings, means, fitting, residuals.fitting, layer, [vector_facts, swept["header"]])
    run.done(Stage.NULL_SPACE, lambda path: pictures.additions(mapped, path), mapped)

    recipes = recipes_of(fit, means, layer, p1_layer, {LOW_RANK: trained})
    doses = dose_curves(
        fit, openings, recipes, trials, "doses", [opening_facts, probed, trained, mapped, *swept.values()]
    )
    edits: dict[str, Edit] = {
        key: scaled(recipes[key].make(found["made_at"]), found["share"])
        for key, found in doses["edits"].items()
        if found["maximum"] >= 1.0
    }
    controls = random_edits(fit, edits, layer)
    ranges = certified_ranges(fit, openings, controls, trials, "controls", [doses])
    edits |= {key: edit for key, (_, edit) in controls.items() if ranges["edits"][key]["maximum"] >= 1.0}
    run.done(Stage.DOSES, lambda path: pictures.doses(doses, path), doses, ranges)

    probe = probe_of(fit, int(probed["layer"]))
    probability, head = read(probe, residuals.calibrating.layer(probe.layer))
    tokens = token_stage(fit, openings, calibrating, [base, opening_facts])
    readings = Readings(probability=probability, head=head, tokens=tokens)
    families = families_of(fit, edits)
    youden = next(point["threshold"] for point in probed["operating_points"] if point["name"] == "youden")
    gates = gate_stage(fit, openings, calibrating, readings, families, edits, youden, [probed, headed, doses, ranges])
    run.done(Stage.GATE, lambda path: pictures.gates(gates, path), gates)
    _, forced = read(probe, residuals.calibrating.layer(probe.layer), len(fit.categories))
    unspared = replace(readings, head=forced) if fit.settings.tells_plain else None
    compared = compare_stage(fit, openings, calibrating, readings, families, edits, gates, [gates], unspared=unspared)
    run.done(Stage.COMPARE, lambda path: pictures.comparison(compared, path), compared)

    plans = profile_plans(fit, families, gates, compared)
    profiles = {
        plan.name: Gated(
            family=plan.family,
            comply_below=plan.comply_below,
            refuse_above=plan.refuse_above,
            is_graded=plan.is_graded,
            reads_tokens=plan.reads_tokens,
        )
        for plan in plans
    }
    held = held_stage(fit, openings, probe, profiles, edits, [gates, compared])
    run.done(Stage.HELD, lambda path: pictures.held(held, path), held)
    default = plans[0].family
    used = [edits[key] for key in sorted({*default.refuse.values(), *default.comply.values()})]
    responded = response_stage(fit, openings, fitting, used, [opening_facts, doses, compared])
    run.done(Stage.RESPONSE, lambda path: pictures.response(responded, path), responded)

    return write_bundle(
        bundle,
        Contents(
            fit=fit,
            openings=openings,
            edits=edits,
            probe=probe,
            plans=plans,
            response=response_probe_of(fit, responded),
            results={
                "activations": base,
                "openings": opening_facts,
                "vectors": vector_facts,
                "layers": swept,
                "probe": probed,
                "head": headed,
                "low_rank": trained,
                "null_space": mapped,
                "doses": doses,
                "controls": ranges,
                "gate": gates,
                "compare": compared,
                "held": held,
                "response": responded,
                "cosines": cosines(_directions(fit, means, layer, p1_layer)),
            },
        ),
        name=name,
        version=version,
        has_report=run.until is Stage.REPORT,
    )


def _directions(fit: Fit, means: Mapping[str, Tensor], layer: int, p1_layer: int | None) -> dict[str, Tensor]:
    """Every direction [D] at the edits' layer, by the name it is shown under."""
    directions = {
        f"{category}": categorical(means, Variant.HEADER, category, layer, fit.settings)[0]
        for category in fit.categories
    }
    if p1_layer == layer:
        directions |= {
            f"P1 {category}": categorical(means, Variant.P1, category, layer, fit.settings)[0]
            for category in fit.categories
        }
    directions["pooled"] = pooled(means, layer, fit.settings)[0]
    directions["low-rank"] = fit.tensors("low_rank")["vector"]
    benign = benign_refusal_direction(means, layer, fit.settings)
    if benign is not None:
        directions["benign refusal"] = benign[0]
    return directions


def profile_plans(
    fit: Fit, families: Mapping[str, Family], gates: Mapping[str, Any], compared: Mapping[str, Any]
) -> list[ProfilePlan]:
    """The bundle's profiles: the default is what won the comparison, the others are one method each.

    These have the default's thresholds, so that they differ from it in their edits alone; P1's has its own.
    """
    winner = Setup(**compared["winner"])
    default = Family(refuse=families[winner.refuse].refuse, comply=families[winner.comply].comply)
    control = another_category(fit, default)
    families = {key: family for key, family in families.items() if key != RANDOM_CATEGORY}
    if len(fit.categories) > 1 and (control.refuse or control.comply):
        families[RANDOM_CATEGORY] = control
    plans = [
        ProfilePlan(
            name=PROFILE,
            description="Answer what only looks harmful, refuse what is: the gate decides for each prompt.",
            family=default,
            comply_below=compared["chosen"]["comply_below"],
            refuse_above=compared["chosen"]["refuse_above"],
            is_graded=winner.is_graded,
        )
    ]
    described = {
        LOW_RANK: ("low-rank", "One vector trained in a whitened basis (arXiv 2603.13359, Algorithm 2)."),
        P1: (
            P1_PROFILE,
            "Algorithm 1 of arXiv 2603.13359 in the chat template: no neutral band, category by the refusal tokens.",
        ),
        POOLED: ("pooled", "One direction for all categories."),
        NULL_SPACE: (
            "null-space",
            "Towards refusal by AlphaSteer's map (arXiv 2506.07022), which spares benign prompts.",
        ),
        BENIGN_REFUSAL: (
            "benign-refusal",
            "Towards answers by the direction between benign prompts the model refuses and those it answers.",
        ),
        RANDOM: (CONTROL_PROFILE, "The control experiment: a random direction of the same norms."),
        RANDOM_CATEGORY: (
            "random-category",
            "The control experiment: each category gets another category's edits of the default profile.",
        ),
    }
    for key, (name, description) in described.items():
        if key in families:
            chosen = gates["families"][key]["chosen"] if key == P1 else compared["chosen"]
            plans.append(
                ProfilePlan(
                    name=name,
                    description=description,
                    family=families[key],
                    comply_below=chosen["comply_below"],
                    refuse_above=chosen["refuse_above"],
                    reads_tokens=key == P1,
                )
            )
    if not any(plan.name == PROFILE and (plan.family.refuse or plan.family.comply) for plan in plans):
        plans = plans[1:]
    return plans
