"""The bundle of a control fit: manifest, report, card and picture from what the stages left.

Knows how a bundle is described; the numbers come from `control.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steering import __version__
from steering.bundle import Bundle, save_bundle
from steering.fingerprint import fingerprint_of
from steering.fit.catalog import CATALOG
from steering.fit.control import (
    RESPOND,
    Fit,
    Settings,
    calibrated_doses,
    certified_range,
    class_means,
    edit_name,
    edits_of,
    held_effects,
    sweep,
)
from steering.terms import Edit

PROFILE = "refusal-control"
CONTROL_PROFILE = "random-control"


def fit_directions(fit: Fit, bundle: Path, *, name: str, version: str) -> Bundle:
    """Run every stage of the categorical fit and write the bundle; goes on where an earlier run stopped."""
    means, means_facts = class_means(fit)
    swept = sweep(fit, means)
    doses = calibrated_doses(fit, means, int(swept["layer"]))
    edits = edits_of(fit, means, doses)
    ranges = certified_range(fit, edits)
    held = held_effects(fit, edits)
    manifest = _manifest(fit, edits, means_facts, doses, ranges, name=name, version=version)
    kept = {record["name"]: edits[record["name"]] for record in manifest["edits"]}
    saved = save_bundle(bundle, manifest, kept)
    report = {
        "settings": asdict(fit.settings),
        "data": means_facts,
        "layer_sweep": swept,
        "doses": doses,
        "strength_ranges": ranges,
        "held": held,
        "judge": "greedy first token: a refusal token is a refusal; through transformers in float32, not the served engine",
    }
    (bundle / "report.json").write_text(
        json.dumps(_without_identity(report), indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    draw_sweep(swept, bundle / "layer_sweep.png")
    (bundle / "CARD.md").write_text(card(saved, report), "utf-8")
    return saved


def draw_sweep(swept: Mapping[str, Any], path: Path) -> None:
    """A picture of the best effect of either sign by layer, with the chosen layer marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.add_subplot()
    layers = [row["layer"] for row in swept["layers"]]
    for sign, label in (("comply", "refusals removed"), ("refuse", "prompts refused")):
        axes.plot(
            layers, [row["chosen"][sign]["effect"] for row in swept["layers"]], marker="o", label=f"{sign}: {label}"
        )
    axes.axvline(swept["layer"], color="grey", linestyle=":", label="chosen layer")
    axes.set(
        xlabel="layer (0-based, block output)", ylabel="share of calibration prompts", ylim=(-0.05, 1.05), xticks=layers
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def card(bundle: Bundle, report: Mapping[str, Any]) -> str:
    """The bundle's card; every number is taken from the report."""
    doses, held = report["doses"], report["held"]
    lines = [
        f"# {bundle.manifest.name} {bundle.manifest.version}",
        "",
        "Categorical refusal directions (From Refusal Tokens to Refusal Control, arXiv 2603.13359, Algorithm 1) of the demo",
        "model: a toy. They were fitted, calibrated and measured on this one model and work on no other.",
        "",
        f"Layer {doses['layer']} (0-based, block output), added at the last prompt token and at every generated token.",
        "Layer and doses were chosen on calibration prompts; the table below is on prompts nothing was fitted on.",
        "The judge is the greedy first token (a refusal token is a refusal), through transformers in float32.",
        "",
        "| held set | n | unsteered | comply | refuse | random | random, other sign |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arms in held["sets"].items():
        cells = " | ".join(
            _percent(arms[arm]) for arm in ("unsteered", "comply", "refuse", "random", "random, other sign")
        )
        lines.append(f"| {name} | {arms['unsteered']['n']} | {cells} |")
    controls = held["controls"]
    lines += [
        "",
        "Refused, in percent, with 95 % Wilson intervals. `comply` and `refuse` are the edits of the default category; `random`",
        f"has the norm of `comply`. Ten more random directions on {controls['set']}: mean {100 * controls['mean']:.1f} %,",
        f"from {100 * min(controls['refused']):.1f} % to {100 * max(controls['refused']):.1f} %.",
        "",
        "| category | comply | refuse | refused under this category |",
        "|---|---|---|---|",
    ]
    for name, dose in doses["categories"].items():
        lines.append(
            f"| {name} | {dose['comply']['coefficient']:.2f} | {dose['refuse']['coefficient']:.2f} "
            f"| {_percent(dose['refuse']['named'])} |"
        )
    lines += [
        "",
        "Doses are lengths along the unit direction at strength 1. `layer_sweep.png` shows the choice of the layer.",
        "",
    ]
    return "\n".join(lines)


def _manifest(
    fit: Fit,
    edits: Mapping[str, Edit],
    means: Mapping[str, Any],
    doses: Mapping[str, Any],
    ranges: Mapping[str, Any],
    *,
    name: str,
    version: str,
) -> dict[str, Any]:
    settings = fit.settings
    provenance = _provenance(settings, means)
    records = []
    for category in settings.categories:
        for purpose in ("refuse", "comply"):
            dose = doses["categories"][category][purpose]
            records.append(
                {
                    "name": edit_name(purpose, category),
                    "purpose": purpose,
                    "category": category,
                    "dose": f"coefficient {dose['coefficient']:.4g} along a unit direction, {dose['multiple']:g} times "
                    "the difference of the class means",
                    "strength": _strength(ranges["edits"][edit_name(purpose, category)], ranges["prompts"]),
                    "provenance": {**provenance, "calibration_effect": dose["effect"]},
                }
            )
    records.append(
        {
            "name": "random",
            "purpose": "control",
            "category": None,
            "dose": f"coefficient {float(edits['random'].layers[0].bias[0]):.4g} along a random unit direction: the norm of "
            "the default category's comply edit",
            "strength": _strength(ranges["edits"]["random"], ranges["prompts"]),
            "provenance": {"method": "random direction", "seed": settings.seed, "code": __version__},
        }
    )
    records = [record for record in records if record["strength"]["maximum"] > 0]
    usable = {record["name"] for record in records}

    def mapped(purpose: str) -> dict[str, str]:
        names = {category: edit_name(purpose, category) for category in settings.categories}
        return {category: edit for category, edit in names.items() if edit in usable}

    everywhere = dict.fromkeys(settings.categories, "random") if "random" in usable else {}
    profiles = [
        {
            "name": PROFILE,
            "description": "Raise or lower refusals of one category by its own direction; the client chooses the mode.",
            "refuse": mapped("refuse"),
            "comply": mapped("comply"),
            "default_category": settings.default_category,
        }
    ]
    if everywhere:
        profiles.append(
            {
                "name": CONTROL_PROFILE,
                "description": "The control experiment: a random direction of the same norm in either mode.",
                "refuse": everywhere,
                "comply": everywhere,
                "default_category": settings.default_category,
            }
        )
    return {
        "name": name,
        "version": version,
        "model": fingerprint_of(fit.loaded.path).model_dump(),
        "categories": [
            {"name": category, "token": f"[{category}]", "token_id": fit.loaded.categories[category]}
            for category in settings.categories
        ],
        "respond": {"token": RESPOND, "token_id": fit.loaded.respond},
        "edits": records,
        "profiles": profiles,
        "default_profile": PROFILE,
    }


def _strength(found: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    return {
        "minimum": 0.0,
        "maximum": found["maximum"],
        "measured": f"largest strength tried that spoiled at most 10 % of {prompts} greedy answers to "
        "calibration prompts: they begin with a refusal token or [respond] and do not repeat themselves",
    }


def _provenance(settings: Settings, means: Mapping[str, Any]) -> dict[str, Any]:
    used = {name.split("/")[0] for sources in means["sources"].values() for name in sources}
    digests = {
        f"{dataset.name}/{file.name}": f"sha256:{file.sha256}"
        for dataset in CATALOG
        if dataset.name in used
        for file in dataset.files
    }
    return {
        "method": "P1 Algorithm 1: difference of class means on the category token",
        "tau": settings.tau,
        "top_k": settings.top_k if settings.top_k is not None else 200,
        "prompts": dict(means["prompts"]),
        "seed": settings.seed,
        "code": _code_version(),
        "data": digests,
    }


def _code_version() -> str:
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


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _without_identity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_identity(inner) for key, inner in value.items() if key != "identity"}
    return value
