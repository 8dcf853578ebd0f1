"""The bundle of a topic fit: manifest, report, card, pictures and page from what the stages left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering.bundle import Bundle, save_bundle
from steering.errors import FitError
from steering.fit.categories import CATEGORIES
from steering.fit.control_bundle import code_version
from steering.fit.stages import Result, plain
from steering.fit.topic_answers import reasoning_end
from steering.fit.topic_candidates import FREE, GATED, Candidate
from steering.fit.topic_card import card
from steering.fit.topic_compare import Arm, Comparison
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_gate import TopicGate
from steering.fit.topic_induction import Induction
from steering.fit.topic_settings import LAYERS_NOTE, TopicPreset
from steering.fit.topic_vectors import Vectors
from steering.plan import Reasoning, Scope

PROFILE, INDUCED = "topics", "topics-induce"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopicContents:
    """Everything a bundle is written from.

    Attributes:
        edits: configurations by the name of their edit, all of them certified.
        comparison: of the arms that remove; None where nothing is removed.
        induction: None where nothing is induced.
        removal_gate, induction_gate: a gate, or why there is none; None where it was not looked for.
        results: what the stages gave, by stage.
        warnings: what went otherwise than it should.
    """

    fit: TopicFit
    vectors: Vectors
    edits: Mapping[str, Candidate]
    comparison: Comparison | None
    induction: Induction | None
    removal_gate: TopicGate | str | None
    induction_gate: TopicGate | str | None
    results: Mapping[str, Result]
    warnings: list[str]


def edit_name(candidate: Candidate) -> str:
    """`<method>-comply` or `<method>-refuse`; gated edits, which begin at their gate's layer, say so."""
    name = f"{candidate.method}-{'refuse' if candidate.alpha > 0 else 'comply'}"
    return f"{name}-gated" if candidate.variant == GATED else name


def save_edits(path: Path, contents: TopicContents, *, name: str, version: str) -> Bundle:
    """Write manifest and tensors, and read them back through every check."""
    fit = contents.fit
    manifest = _manifest(contents, name=name, version=version)
    edits = {key: one.made(contents.vectors, key) for key, one in contents.edits.items()}
    probes = {gate.probe.name: gate.probe for gate in _gates(contents)} | fit.response()[1]
    saved = save_bundle(path, manifest, edits, probes)
    fit.stage("bundle", lambda: {"label": saved.label, "edits": sorted(edits)}, given={"bundle": saved.digest})
    return saved


def write_report(path: Path, contents: TopicContents, saved: Bundle, pictures: list[str]) -> None:
    """Write report, card, page and pictures beside the edits."""
    fit = contents.fit
    report = _report(contents, saved)
    (path / "report.json").write_text(json.dumps(report, separators=(",", ":"), ensure_ascii=False) + "\n", "utf-8")
    for old in path.glob("*.png"):
        old.unlink()
    for picture in pictures:
        shutil.copyfile(fit.work / f"{picture}.png", path / f"{picture}.png")
    (path / "CARD.md").write_text(card(saved, report), "utf-8")
    from steering.evaluate.page_topics import write_topics_page

    write_topics_page(report, path / "report.html")


def _gates(contents: TopicContents) -> list[TopicGate]:
    """Those that some profile uses."""
    found = []
    if isinstance(contents.removal_gate, TopicGate) and any(
        one.variant == GATED and one.alpha < 0 for one in contents.edits.values()
    ):
        found.append(contents.removal_gate)
    if isinstance(contents.induction_gate, TopicGate) and any(
        one.variant == GATED and one.alpha > 0 for one in contents.edits.values()
    ):
        found.append(contents.induction_gate)
    return found


def _manifest(contents: TopicContents, *, name: str, version: str) -> dict[str, Any]:
    fit = contents.fit
    profiles = _profiles(contents)
    if not profiles:
        raise FitError("no edit of this fit can be certified, so that there is nothing to put into a bundle")
    named = dict(fit.refusal_tokens)
    reading, _ = fit.response()
    categories = [fit.settings.category, *(one for one in CATEGORIES if one in named and one != fit.settings.category)]
    return {
        "name": name,
        "version": version,
        "model": fit.fingerprint,
        "categories": [
            {"name": one} | ({"token": f"[{one}]", "token_id": named[one]} if one in named else {})
            for one in categories
        ],
        "respond": {"token": "[respond]", "token_id": fit.respond} if fit.respond is not None else None,
        # A client learns from this where reasoning ends, which an edit of every token covers too, as in the paper.
        "reasoning_end": reasoning_end(contents.results["answers"]),
        **reading,
        "probes": [*(_probe(contents, gate) for gate in _gates(contents)), *reading["probes"]],
        "edits": [_edit(contents, key, one) for key, one in contents.edits.items()],
        "profiles": profiles,
        "default_profile": profiles[0]["name"],
    }


def _edit(contents: TopicContents, key: str, one: Candidate) -> dict[str, Any]:
    fit, settings = contents.fit, contents.fit.settings
    ranges = contents.results["ranges"]
    scores = {score.layer: score for score in contents.vectors.scores[one.method]}
    scale = {
        str(layer): scores[layer].refuse_scale if one.alpha > 0 else scores[layer].comply_scale for layer in one.layers
    }
    form = "repositioned to" if one.is_reposition else "moved by"
    return {
        "name": key,
        "purpose": "refuse" if one.alpha > 0 else "comply",
        "category": settings.category,
        "dose": f"{form} α = {one.alpha:g} times the scale of each layer, in units of refusal confidence",
        "strength": {
            "minimum": 0.0,
            "maximum": ranges["edits"][key]["maximum"],
            "measured": f"largest strength tried that broke at most {settings.most_spoiled:.0%} more of "
            f"{ranges['edits'][key]['n']} greedy answers to calibration prompts than none did",
        },
        "provenance": {
            "method": f"{one.method} (arXiv 2512.16602, eqs. 1-5; WMD of arXiv 2504.17130)",
            "alpha": one.alpha,
            "is_reposition": one.is_reposition,
            "scope": one.scope.value,
            "scales": scale,
            "ridge": {"kind": settings.ridge.kind.value, "value": settings.ridge.value},
            "is_literal": settings.is_literal,
            "classes": contents.results["vectors"]["classes"],
            "band": settings.band,
            "judge": dict(fit.judge_facts),
            "prompts": contents.results["prompts"]["digest"],
            "sources": contents.results["prompts"]["sources"],
            "seed": settings.seed,
            "code": code_version(),
        },
    }


def _probe(contents: TopicContents, gate: TopicGate) -> dict[str, Any]:
    facts = gate.facts
    return {
        "name": gate.probe.name,
        "operating_points": facts["operating_points"],
        "calibration": {**facts["calibration"], "area": facts["area"]},
        "provenance": {
            "method": "logistic regression on residuals at the last prompt token, standardisation and Platt scaling "
            "folded into weights and bias",
            "above": facts["above"],
            "below": facts["below"],
            "prompts": facts["prompts"],
            "penalty": contents.fit.settings.penalty,
            "seed": contents.fit.settings.seed,
            "code": code_version(),
        },
    }


def _profiles(contents: TopicContents) -> list[dict[str, Any]]:
    """The default first."""
    found: list[dict[str, Any]] = []
    compared = contents.comparison
    if compared is not None:
        usable = [arm for arm in compared.arms if edit_name(arm.found.candidate) in contents.edits]
        if compared.default in usable:
            found.append(_removing(contents, PROFILE, compared.default, "Answer on the topic: the default."))
        for name, is_gated, what in (
            (f"{PROFILE}-gated", True, "Answer on the topic where the gate finds that the refusal need not stand."),
            (f"{PROFILE}-ungated", False, "Answer on the topic; whoever asks for it steers every prompt."),
        ):
            best = _best([arm for arm in usable if arm.is_gated is is_gated])
            if best is not None:
                found.append(_removing(contents, name, best, what))
        for method in contents.fit.settings.methods:
            mine = [arm for arm in usable if arm.found.candidate.method is method]
            same = [arm for arm in mine if arm.is_gated is compared.default.is_gated]
            best = _best(same or mine)
            if best is not None:
                found.append(_removing(contents, f"{PROFILE}-{method}", best, f"The same by {method.upper()}."))
    induced = contents.induction
    if induced is not None:
        for name, one, threshold in (
            (INDUCED, induced.gated, induced.refuse_above),
            (INDUCED if induced.gated is None else f"{INDUCED}-ungated", induced.free, None),
        ):
            if one is not None and edit_name(one) in contents.edits:
                found.append(_inducing(contents, name, one, threshold))
    return found


def _best(arms: list[Arm]) -> Arm | None:
    """Of arms of one kind the one that leaves least refusal, safe ones first."""
    return min(
        arms,
        key=lambda arm: (not arm.is_safe, arm.rates["calibrate"]["refused"]["rate"], arm.found.shift),
        default=None,
    )


def _removing(contents: TopicContents, name: str, arm: Arm, what: str) -> dict[str, Any]:
    settings = contents.fit.settings
    one = arm.found.candidate
    told = f"{what} {one.method.upper()}, {len(one.layers)} layers, α {one.alpha:g} (arXiv 2512.16602)."
    profile: dict[str, Any] = {
        "name": name,
        "description": told,
        "comply": {settings.category: edit_name(one)},
        "default_category": settings.category,
        "scope": one.scope.value if one.variant == FREE else Scope.GENERATED.value,
        "reasoning": settings.reasoning.value,
    }
    if arm.is_gated:
        assert isinstance(contents.removal_gate, TopicGate)
        profile["gate"] = {
            "probe": contents.removal_gate.probe.name,
            "comply_below": arm.comply_below,
            "refuse_above": 1.0,
        }
    return profile


def _inducing(contents: TopicContents, name: str, one: Candidate, refuse_above: float | None) -> dict[str, Any]:
    settings = contents.fit.settings
    profile: dict[str, Any] = {
        "name": name,
        "description": f"Refuse on chosen prompts: {one.method.upper()}, {len(one.layers)} layers, α {one.alpha:g}.",
        "refuse": {settings.category: edit_name(one)},
        "default_category": settings.category,
        "scope": one.scope.value if one.variant == FREE else Scope.GENERATED.value,
        "reasoning": settings.reasoning.value,
    }
    if refuse_above is not None:
        assert isinstance(contents.induction_gate, TopicGate)
        profile["gate"] = {
            "probe": contents.induction_gate.probe.name,
            "comply_below": 0.0,
            "refuse_above": refuse_above,
        }
    return profile


def _report(contents: TopicContents, saved: Bundle) -> dict[str, Any]:
    fit = contents.fit
    compared = contents.comparison
    results = {stage: plain(found) for stage, found in contents.results.items()}
    results["prompts"].pop("prompts", None)
    results["judged"].pop("confidence", None)
    results["judged"].pop("fixed", None)
    for stage in ("kept", "parts", "contents", "folder"):
        results["answers"].pop(stage, None)
    return {
        "kind": "topics",
        "bundle": saved.label,
        "model": {key: fit.fingerprint[key] for key in ("architecture", "hidden_size", "layers")},
        "settings": asdict(fit.settings),
        "judge": dict(fit.judge_facts),
        "code": code_version(),
        "thinks": results["answers"]["thinks"],
        "scope_note": _scope_note(contents, is_thinking=bool(results["answers"]["thinks"])),
        "layers_note": LAYERS_NOTE if fit.settings.preset is not TopicPreset.AUTO else None,
        "default": None if compared is None else {"arm": compared.default.name, "reason": compared.reason},
        "gates": {
            name: gate if isinstance(gate, str) else None
            for name, gate in (("removal", contents.removal_gate), ("induction", contents.induction_gate))
            if gate is not None
        },
        "warnings": list(contents.warnings),
        "profiles": [profile.model_dump(mode="json") for profile in saved.manifest.profiles],
        **results,
    }


def _scope_note(contents: TopicContents, *, is_thinking: bool) -> str:
    scope = contents.fit.settings.scope
    told = (
        "Free edits reach every position, the prompt's included."
        if scope is Scope.ALL
        else "Edits reach the last prompt token and everything generated."
    )
    told += " Gated edits reach the last prompt token and everything generated, since a gate decides there."
    if is_thinking:
        told += " The model reasons before it answers: "
        told += (
            "edits begin where its reasoning ends."
            if contents.fit.settings.reasoning is Reasoning.SPARED
            else "its reasoning is generated, so that every edit covers it too."
        )
    return told
