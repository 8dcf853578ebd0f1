"""The card of a topic bundle: what it holds and what it does, for people. Every number is taken from the report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from steering.bundle import Bundle

ROLES = {"refused": "topic refused", "safety": "harmful refused", "answered": "answered prompts refused"}


def card(bundle: Bundle, report: Mapping[str, Any]) -> str:
    """CARD.md."""
    manifest, classes = bundle.manifest, report["vectors"]["classes"]
    lines = [
        f"# {manifest.name} {manifest.version}",
        "",
        *_paragraph(
            f"Refusal of one topic, for one model ({manifest.model.architecture}, {manifest.model.layers} layers of",
            f"width {manifest.model.hidden_size}). Method: Refusal Steering (arXiv 2512.16602). Directions come from",
            f"{classes['refused']} refused and {classes['answered']} answered prompts ({classes['neutral']} neutral),",
            f"as the judge `{report['judge']['name']}` sees {report['settings']['samples']} sampled answers to each.",
            "Layers, doses and thresholds were chosen on calibration prompts.",
            report["scope_note"],
        ),
        "## Profiles",
        "",
        "| profile | decides by | what it is |",
        "|---|---|---|",
        *(
            f"| `{profile.name}`{' (default)' if profile.name == manifest.default_profile else ''} "
            f"| {_gate(profile.gate)} | {profile.description} |"
            for profile in manifest.profiles
        ),
        "",
    ]
    if report.get("compare"):
        lines += [*_paragraph(f"The default: {report['default']['reason']}."), *_compared(report), *_verified(report)]
    if report.get("induction"):
        lines += _induced(report)
    lines += [
        "## Edits",
        "",
        "| edit | layers | dose | certified strength |",
        "|---|---|---|---|",
        *(
            f"| `{edit.name}` | {', '.join(map(str, edit.layers))} | {edit.dose} | 0 to {edit.strength.maximum:g} |"
            for edit in manifest.edits
        ),
        "",
        "## What to know",
        "",
        *(f"- {line}" for line in _limits(report)),
        "",
    ]
    return "\n".join(lines)


def _paragraph(*parts: str) -> list[str]:
    return [*textwrap.wrap(" ".join(parts), 118, break_long_words=False, break_on_hyphens=False), ""]


def _gate(gate: Any) -> str:
    if gate is None:
        return "the client, who names the mode"
    if gate.refuse_above >= 1.0:
        return f"complies at or below {gate.comply_below:.3f}"
    return f"refuses at or above {gate.refuse_above:.3f}"


def _cell(rate: Mapping[str, float]) -> str:
    if not rate["n"]:
        return "n/a"
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _compared(report: Mapping[str, Any]) -> list[str]:
    compared = report["compare"]
    lines = []
    for use, title in (("calibrate", "Calibration prompts, on which all was chosen"), ("test", "Test prompts")):
        counts = {role: compared["unsteered"][use][role]["n"] for role in ROLES}
        if not any(counts.values()):
            continue
        heads = [f"{name}, % (n = {counts[role]})" for role, name in ROLES.items()]
        lines += [
            f"### {title}",
            "",
            f"| arm | {' | '.join(heads)} | shift, nats a token |",
            "|---|" + "---|" * (len(heads) + 1),
            f"| unsteered | {' | '.join(_cell(compared['unsteered'][use][role]) for role in ROLES)} | 0 |",
            *(
                f"| {arm['name']} | {' | '.join(_cell(arm['rates'][use][role]) for role in ROLES)} "
                f"| {arm['shift']:.4f} |"
                for arm in compared["arms"]
            ),
            "",
        ]
    lines += _paragraph(
        "Rates in percent with 95 % Wilson intervals. The shift is the mean change of the log-probability of fixed",
        "answers to answered prompts while the edit is on; a gate leaves most of these prompts alone.",
    )
    return lines


def _verified(report: Mapping[str, Any]) -> list[str]:
    found = report.get("verify")
    if not found:
        return []
    return _paragraph(
        f"Run by the engine, the gate of `{found['profile']}` made the decision it was chosen by on",
        f"{found['same_decision']} of {found['n']} of them, and {found['same_verdict']} verdicts were the same.",
    )


def _induced(report: Mapping[str, Any]) -> list[str]:
    found = report["induction"]
    lines = [
        "### Induced refusals, calibration prompts",
        "",
        "| configuration | topic, % | general, % |",
        "|---|---|---|",
    ]
    base = found["unsteered"]["calibrate"]
    lines.append(f"| unsteered | {_cell(base['topic'])} | {_cell(base['general'])} |")
    for variant, chosen in found["chosen"].items():
        row = found["curve"][chosen["candidate"]]
        rates = row["rates"]["calibrate"]
        name = f"{row['method']}, {row['count']} layers, α {row['alpha']:g}, {variant}"
        lines.append(f"| {name} | {_cell(rates['topic'])} | {_cell(rates['general'])} |")
    return [*lines, ""]


def _limits(report: Mapping[str, Any]) -> list[str]:
    told = list(report["warnings"])
    told += [f"No {name} gate: {why}." for name, why in report["gates"].items() if why]
    if report["layers_note"]:
        told.append(report["layers_note"] + ".")
    unjudged = report["judged"]["unjudged"]
    if unjudged:
        told.append(
            f"{unjudged} prompts have no confidence, because the judge gave no verdict on any of their answers."
        )
    told.append("Only refusal is measured here, not whether what is answered instead is true.")
    return told
