"""The bundle of a control fit: manifest, report, card and picture from what the stages left.

Knows how a bundle is described; the numbers come from `control.py`.
"""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from steering import __version__
from steering.bundle import Bundle, save_bundle
from steering.fingerprint import fingerprint_of
from steering.fit.catalog import CATALOG
from steering.fit.control import RESPOND, Fit, Settings, Variant, class_means
from steering.fit.doses import (
    calibrated_doses,
    certified_range,
    edit_name,
    edits_of,
    held_effects,
    settled_doses,
    sweep,
)
from steering.terms import Edit

PROFILE = "refusal-control"
P1_PROFILE = "p1-categorical"
CONTROL_PROFILE = "random-control"


def fit_directions(fit: Fit, bundle: Path, *, name: str, version: str) -> Bundle:
    """Run every stage of the categorical fit and write the bundle; goes on where an earlier run stopped."""
    means, means_facts = class_means(fit)
    swept = {variant.value: sweep(fit, means, variant) for variant in Variant}
    doses = {variant.value: calibrated_doses(fit, means, variant, int(swept[variant]["layer"])) for variant in Variant}
    ranges = certified_range(fit, edits_of(fit, means, doses))
    settled = settled_doses(fit, means, doses, ranges)
    edits = edits_of(fit, means, settled)
    held = held_effects(fit, edits)
    manifest = _manifest(fit, edits, means_facts, settled, ranges, name=name, version=version)
    kept = {record["name"]: edits[record["name"]] for record in manifest["edits"]}
    saved = save_bundle(bundle, manifest, kept)
    report = {
        "settings": asdict(fit.settings),
        "data": means_facts,
        "layer_sweep": swept,
        "doses_for_the_first_token": doses,
        "strength_ranges": ranges,
        "doses": settled,
        "held": held,
        "judge": "greedy first token, through transformers in float32: a refusal token is a refusal",
    }
    (bundle / "report.json").write_text(
        json.dumps(_without_identity(report), indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    draw_sweep(swept[Variant.HEADER], bundle / "layer_sweep.png")
    (bundle / "CARD.md").write_text(card(saved, report), "utf-8")
    return saved


def draw_sweep(swept: Mapping[str, Any], path: Path) -> None:
    """A picture of the best effect of either sign by layer, with the chosen layer marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.add_subplot()
    layers = [row["layer"] for row in swept["layers"]]
    for sign, label in (("comply", "borderline refusals removed"), ("refuse", "plain prompts refused")):
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
    header, printed = doses[Variant.HEADER], doses[Variant.P1]
    controls = held["controls"]
    arms = ("unsteered", "comply", "refuse", "random", "random, other sign", "P1 comply", "P1 refuse")
    lines = [
        f"# {bundle.manifest.name} {bundle.manifest.version}",
        "",
        *_paragraph(
            "Categorical refusal directions of the demo model, a toy: fitted, calibrated and measured on this one",
            "model. Two variants of From Refusal Tokens to Refusal Control (arXiv 2603.13359), both added at the",
            "last prompt token and at every generated token, each at the one layer (0-based, block output) that",
            "calibration chose:",
        ),
        f"- profile `{PROFILE}` (the default), layer {header['layer']}: class means at the last prompt token,",
        "  against plainly benign prompts",
        f"- profile `{P1_PROFILE}`, layer {printed['layer']}: Algorithm 1 as printed, class means on the",
        "  category token, against `[respond]` after contrast prompts. In a model this small it also says that the",
        "  token has been written: towards refusal, larger doses make answers skip it, so their effect is limited",
        "",
        "## On held prompts",
        "",
        *_paragraph(
            "Share of prompts refused, in percent, with 95 % Wilson intervals. The judge is the greedy first token",
            "(a refusal token is a refusal), through transformers in float32. `comply` and `refuse` are the edits",
            "of the default category at strength 1; `random` has the norm of `comply`. Ten more random directions",
            f"on {controls['set']}: mean {100 * controls['mean']:.1f} %, from {100 * min(controls['refused']):.1f} %",
            f"to {100 * max(controls['refused']):.1f} %.",
        ),
        "| held set | n | " + " | ".join(arms) + " |",
        "|---" * (len(arms) + 2) + "|",
    ]
    for name, found in held["sets"].items():
        cells = " | ".join(_percent(found[arm]) for arm in arms)
        lines.append(f"| {name} | {found['unsteered']['n']} | {cells} |")
    lines += [
        "",
        "## Doses",
        "",
        *_paragraph(
            "Lengths along the unit direction at strength 1, and what they did on calibration prompts: refusals of",
            "the category's own prompts before and after `comply`, of plain prompts before and after `refuse`, and",
            "the share of the latter refused under this category. Doses were lowered until answers stay well formed",
            "at strength 1.25. `layer_sweep.png` shows the choice of the layer.",
        ),
        "| profile | category | comply | n | before | after | refuse | n | before | after | under this category, % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for profile, variant in ((PROFILE, header), (P1_PROFILE, printed)):
        for name, dose in variant["categories"].items():
            comply, refuse = dose["comply"], dose["refuse"]
            cells = " | ".join(
                f"{side['coefficient']:.1f} | {side['refused']['n']} | {100 * side['unsteered']['rate']:.0f} "
                f"| {100 * side['refused']['rate']:.0f}"
                for side in (comply, refuse)
            )
            lines.append(f"| {profile} | {name} | {cells} | {_percent(refuse['named'])} |")
    return "\n".join([*lines, ""])


def _manifest(
    fit: Fit,
    edits: Mapping[str, Edit],
    means: Mapping[str, Any],
    settled: Mapping[str, Any],
    ranges: Mapping[str, Any],
    *,
    name: str,
    version: str,
) -> dict[str, Any]:
    settings = fit.settings
    records: list[dict[str, Any]] = []
    for variant, category, purpose in product(Variant, settings.categories, ("refuse", "comply")):
        dose = settled[variant]["categories"][category][purpose]
        key = edit_name(purpose, category, variant)
        records.append(
            {
                "name": key,
                "purpose": purpose,
                "category": category,
                "dose": f"coefficient {dose['coefficient']:.4g} along a unit direction, {dose['multiple']:.3g} times "
                "the difference of the class means",
                "strength": _strength(dose["maximum"], ranges["prompts"]),
                "provenance": _provenance(settings, means, variant),
            }
        )
    records.append(
        {
            "name": "random",
            "purpose": "control",
            "category": None,
            "dose": f"coefficient {float(edits['random'].layers[0].bias[0]):.4g} along a random unit direction: the "
            "norm of the default category's comply edit",
            "strength": _strength(ranges["edits"]["random"]["maximum"], ranges["prompts"]),
            "provenance": {"method": "random direction", "seed": settings.seed, "code": __version__},
        }
    )
    # An edit that spoils answers at every strength tried is left out; the report has its numbers.
    records = [record for record in records if record["strength"]["maximum"] > 0]
    usable = {record["name"] for record in records}

    def profile(name: str, description: str, edit: Callable[[str, str], str]) -> dict[str, Any]:
        chosen = {
            purpose: {category: edit(purpose, category) for category in settings.categories}
            for purpose in ("refuse", "comply")
        }
        usable_edits = {
            purpose: {category: key for category, key in names.items() if key in usable}
            for purpose, names in chosen.items()
        }
        return {
            "name": name,
            "description": description,
            **usable_edits,
            "default_category": settings.default_category,
        }

    profiles = [
        profile(PROFILE, "Raise or lower refusals by a category's direction; the client chooses the mode.", edit_name),
        profile(
            P1_PROFILE,
            "The same with Algorithm 1 of arXiv 2603.13359 as printed.",
            lambda purpose, category: edit_name(purpose, category, Variant.P1),
        ),
        profile(
            CONTROL_PROFILE,
            "The control experiment: a random direction of the same norm in either mode.",
            lambda _purpose, _category: "random",
        ),
    ]
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


def _strength(maximum: float, prompts: int) -> dict[str, Any]:
    return {
        "minimum": 0.0,
        "maximum": maximum,
        "measured": f"largest strength tried that spoiled at most 15 % of {prompts} greedy answers to "
        "calibration prompts: they begin with a refusal token or [respond] and do not repeat themselves",
    }


def _provenance(settings: Settings, means: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    used = {name.split("/")[0] for sources in means["sources"].values() for name in sources}
    digests = {
        f"{dataset.name}/{file.name}": f"sha256:{file.sha256}"
        for dataset in CATALOG
        if dataset.name in used
        for file in dataset.files
    }
    read = {
        Variant.P1: "on the category token, against [respond] after contrast prompts (P1 Algorithm 1)",
        Variant.HEADER: "at the last prompt token, against plainly benign prompts (P1 Algorithm 1 at another position)",
    }
    return {
        "method": f"difference of class means {read[variant]}",
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


def _paragraph(*pieces: str) -> list[str]:
    """The pieces as one paragraph of wrapped lines, and an empty line."""
    return [*textwrap.wrap(" ".join(pieces), 118), ""]


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _without_identity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_identity(inner) for key, inner in value.items() if key != "identity"}
    return value
