"""The bundle of a control fit: manifest, report and card from what the stages left.

Knows how a bundle is described; the numbers come from the stages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering import __version__
from steering.bundle import Bundle, save_bundle
from steering.fit import pictures
from steering.fit.catalog import CATALOG
from steering.fit.certified import budgets_of, in_words
from steering.fit.control import Fit
from steering.fit.control_card import card
from steering.fit.families import Family
from steering.fit.openings import Openings
from steering.fit.response_stage import response_record
from steering.fit.stages import plain
from steering.fit.vectors import RESPOND
from steering.gate import Probe
from steering.plan import CategorySource
from steering.terms import Edit

PROFILE, P1_PROFILE, CONTROL_PROFILE = "refusal-control", "p1-categorical", "random-control"
PICTURES = ("layers", "probe", "head", "doses", "gate", "compare", "held", "response", "cosines")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """A profile of the bundle; see `steering.manifest.Profile`."""

    name: str
    description: str
    family: Family
    comply_below: float
    refuse_above: float
    is_graded: bool = False
    reads_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """Everything a bundle is written from.

    Attributes:
        edits: those that were certified, by name.
        plans: the default profile first.
        results: what the stages gave, by stage.
        response: the probe of generated tokens; None where there is none.
    """

    fit: Fit
    openings: Openings
    edits: Mapping[str, Edit]
    probe: Probe
    plans: list[ProfilePlan]
    results: Mapping[str, Any]
    response: Probe | None = None


def write_bundle(path: Path, contents: Contents, *, name: str, version: str, has_report: bool) -> Bundle:
    """Write manifest and tensors, and with `has_report` also report.json, CARD.md and the pictures."""
    used = {
        key: contents.edits[key]
        for plan in contents.plans
        for side in (plan.family.refuse, plan.family.comply)
        for key in side.values()
    }
    probes = {probe.name: probe for probe in (contents.probe, contents.response) if probe is not None}
    saved = save_bundle(path, _manifest(contents, used, name=name, version=version), used, probes)
    fit = contents.fit
    fit.stage(
        "bundle",
        lambda: {"digest": saved.digest, "path": path.name, "edits": sorted(used)},
        after=[{"digest": saved.digest}],
    )
    if not has_report:
        return saved
    report = {
        "settings": plain(asdict(fit.settings)),
        "categories": list(fit.categories),
        "profiles": [{**asdict(plan), "family": asdict(plan.family)} for plan in contents.plans],
        "judge": "beginnings of greedy answers, through transformers: "
        + ("a refusal token is a refusal" if contents.openings.is_tokens else "a refusal opening is a refusal"),
        "left_out": sorted(key for key, found in contents.results["doses"]["edits"].items() if found["maximum"] < 1.0),
        **{stage: plain(found) for stage, found in contents.results.items()},
    }
    (path / "report.json").write_text(json.dumps(report, separators=(",", ":"), ensure_ascii=False) + "\n", "utf-8")
    pictures.matrix(contents.results["cosines"], fit.work / "cosines.png", "cosines of the directions")
    for old in path.glob("*.png"):
        old.unlink()
    for picture in PICTURES:
        shutil.copyfile(fit.work / f"{picture}.png", path / f"{picture}.png")
    (path / "CARD.md").write_text(card(saved, report), "utf-8")
    return saved


def _manifest(contents: Contents, used: Mapping[str, Edit], *, name: str, version: str) -> dict[str, Any]:
    fit, results = contents.fit, contents.results
    doses = results["doses"]["edits"]
    records = []
    for key, edit in used.items():
        if key in doses:
            dose = doses[key]
            records.append(
                {
                    "name": key,
                    "purpose": dose["purpose"],
                    "category": dose["category"],
                    "dose": f"{dose['multiple']:.4g} times {dose['unit']}",
                    "strength": _strength(fit, dose["purpose"], dose),
                    "provenance": _provenance(contents, key),
                }
            )
        else:
            coefficient = float(edit.layers[0].bias[0])
            records.append(
                {
                    "name": key,
                    "purpose": "control",
                    "category": None,
                    "dose": f"coefficient {coefficient:.4g} along a random unit direction: the length of the default "
                    "category's edit",
                    "strength": _strength(fit, key.removeprefix("random-"), results["controls"]["edits"][key]),
                    "provenance": {"method": "random direction", "seed": fit.settings.seed, "code": __version__},
                }
            )
    tokens = fit.loaded.categories if contents.openings.is_tokens else {}
    return {
        "name": name,
        "version": version,
        "model": fit.fingerprint,
        "categories": [
            {"name": category}
            | ({"token": f"[{category}]", "token_id": tokens[category]} if category in tokens else {})
            for category in fit.head_categories
        ],
        "respond": {"token": RESPOND, "token_id": contents.openings.respond} if contents.openings.respond else None,
        "probes": [_probe_record(contents), *_response_records(contents)],
        **({} if contents.response is None else {"response_probe": contents.response.name}),
        "edits": records,
        "profiles": [
            {
                "name": plan.name,
                "description": plan.description,
                "refuse": plan.family.refuse,
                "comply": plan.family.comply,
                "default_category": fit.settings.default_category,
                "gate": {
                    "probe": contents.probe.name,
                    "comply_below": plan.comply_below,
                    "refuse_above": plan.refuse_above,
                    "is_graded": plan.is_graded,
                    "category_source": CategorySource.REFUSAL_TOKENS if plan.reads_tokens else CategorySource.PROBE,
                },
            }
            for plan in contents.plans
        ],
        "default_profile": contents.plans[0].name,
    }


def _probe_record(contents: Contents) -> dict[str, Any]:
    fit, found, head = contents.fit, contents.results["probe"], contents.results["head"]
    return {
        "name": contents.probe.name,
        "operating_points": found["operating_points"],
        "calibration": {**found["calibration"], "scaling": found["scaling"], "area": found["area"]},
        "provenance": {
            "method": "logistic regression on residuals at the last prompt token, standardisation folded into weights "
            "and bias; a multinomial head names the category",
            "penalty": fit.settings.penalty,
            "head_penalty": fit.settings.head_penalty,
            "imbalance": found["imbalance"],
            "head": {key: head[key] for key in ("accuracy", "balanced_accuracy", "n", "prompts")},
            "seed": fit.settings.seed,
            "code": code_version(),
            "data": _digests(contents.results["activations"]["prompts"]["fit"]),
        },
    }


def _response_records(contents: Contents) -> list[dict[str, Any]]:
    if contents.response is None:
        return []
    fit = contents.fit
    data = _digests(contents.results["activations"]["prompts"]["fit"])
    provenance = {"seed": fit.settings.seed, "code": code_version(), "data": data}
    return [response_record(contents.results["response"], provenance)]


def _strength(fit: Fit, purpose: str, found: Mapping[str, Any]) -> dict[str, Any]:
    told = in_words(budgets_of(fit, purpose), found["tried"])
    if found.get("is_beyond_budget"):
        told = "not certified: a fixed dose, beyond what the budgets of this fit allow"
    return {"minimum": 0.0, "maximum": found["maximum"], "measured": told}


def _provenance(contents: Contents, key: str) -> dict[str, Any]:
    fit, results = contents.fit, contents.results
    facts: dict[str, Any] = {"seed": fit.settings.seed, "code": code_version()}
    if key.endswith("-low-rank"):
        trained = results["low_rank"]
        facts |= {
            "method": "vector trained in the whitened basis of the category directions (P1 Algorithm 2)",
            "training": asdict(fit.settings.training),
            "epsilon": fit.settings.epsilon,
            **{name: trained[name] for name in ("covariance", "added", "shrinkage", "scale", "history")},
            "data": _digests(results["activations"]["prompts"]["fit"]),
        }
        return facts
    if key.endswith("-null-space"):
        mapped = results["null_space"]
        facts |= {
            "method": "AlphaSteer's map from the near null space of benign residuals (arXiv 2506.07022)",
            **{name: mapped[name] for name in ("rank", "null_directions", "ridge", "prompts", "mean_addition")},
            "data": _digests(results["activations"]["prompts"]["fit"]),
        }
        return facts
    read = "at the last prompt token, against plainly benign prompts (P1 Algorithm 1 at another position)"
    if key.startswith("p1-"):
        read = "on the category token, against [respond] after contrast prompts (P1 Algorithm 1)"
    elif key == "comply-benign-refusal":
        read = "of benign prompts that the model refuses, against those it answers (BR - BC)"
    prefix = "p1/" if key.startswith("p1-") else "header/"
    vectors = results["vectors"]
    return {
        **facts,
        "method": f"difference of class means {read}",
        "tau": fit.settings.tau,
        "top_k": fit.settings.top_k if fit.settings.top_k is not None else 200,
        "prompts": {name: count for name, count in vectors["prompts"].items() if name.startswith(prefix)},
        "data": _digests({source: 1 for found in vectors["sources"].values() for source in found}),
    }


def _digests(sources: Mapping[str, Any]) -> dict[str, str]:
    used = {source.split("/")[0] for source in sources}
    return {
        f"{dataset.name}/{file.name}": f"sha256:{file.sha256}"
        for dataset in CATALOG
        if dataset.name in used
        for file in dataset.files
    }


def code_version() -> str:
    """The package's version, with the commit where the code is run from a checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"
