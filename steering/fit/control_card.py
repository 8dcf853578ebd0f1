"""The card of a control bundle: what it holds and what it does, for people. Every number is taken from the report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from steering.bundle import Bundle

PLAIN_GROUPS = ("plain", "everyday")


def card(bundle: Bundle, report: Mapping[str, Any]) -> str:
    """CARD.md."""
    probe, head, gate, compared = report["probe"], report["head"], report["gate"], report["compare"]
    layer = report["layers"]["header"]["layer"]
    count, dropped = report["activations"]["count"], report["activations"]["dropped"]
    lines = [
        f"# {bundle.manifest.name} {bundle.manifest.version}",
        "",
        *_paragraph(
            f"Refusal control for one model ({bundle.manifest.model.architecture}, {bundle.manifest.model.layers}",
            f"layers of width {bundle.manifest.model.hidden_size}): a probe reads the prompt at layer {probe['layer']}",
            f"and picks the edit at layer {layer} (0-based, block outputs), applied from the last prompt token on.",
            "Method: From Refusal Tokens to Refusal Control (arXiv 2603.13359) with a neutral band, fitted on",
            f"{count['fit']} prompts; layers, doses and thresholds were chosen on {count['calibrate']} others; the",
            "tables below are on prompts that neither saw.",
        ),
        "## Profiles",
        "",
        "| profile | comply at or below | refuse at or above | what it is |",
        "|---|---|---|---|",
        *(
            f"| `{profile.name}`{' (default)' if profile.name == bundle.manifest.default_profile else ''} "
            f"| {profile.gate.comply_below:.3f} | {profile.gate.refuse_above:.3f} | {profile.description} |"
            for profile in bundle.manifest.profiles
            if profile.gate is not None
        ),
        "",
        *_held(report["held"]),
        "## The probe",
        "",
        *_paragraph(
            f"Area under the ROC curve on calibration prompts {probe['area']:.3f}; expected calibration error",
            f"{probe['calibration']['expected_calibration_error']:.3f},",
            f"Brier score {probe['calibration']['brier']:.3f}.",
            f"On held prompts, without plain ones, the area is {report['held'].get('probe', {}).get('area', 0.0):.3f}.",
            f"The category head is right on {100 * head['accuracy']:.1f} % of {head['n']} calibration prompts",
            f"({100 * head['balanced_accuracy']:.1f} % as a mean over categories)."
            + (
                f" It agrees with the model's own refusal token on {100 * gate['category_sources_agree']:.1f} %."
                if gate["category_sources_agree"] is not None
                else ""
            ),
        ),
        *_paragraph(
            f"It was fitted on {probe['imbalance']['prompts']['refuse']} prompts to refuse and",
            f"{probe['imbalance']['prompts']['answer']} to answer; {probe['imbalance']['how']}.",
            f"Left out before, as held prompts or repeats: {sum(dropped['fit'].values())} of those to fit on and",
            f"{sum(dropped['calibrate'].values())} of those to calibrate on (`report.json` says of which sets).",
        ),
        *_plain(head, compared),
        "| operating point | threshold | true positives | false positives |",
        "|---|---|---|---|",
        *(
            f"| {point['name']} | {point['threshold']:.3f} | {100 * point['true_positive_rate']:.1f} % "
            f"| {100 * point['false_positive_rate']:.1f} % |"
            for point in probe["operating_points"]
        ),
        "",
        *_response(report["response"]),
        "## What was compared",
        "",
        *_paragraph(f"On calibration prompts: {compared['rule']}."),
        "| what | kept | not kept |",
        "|---|---|---|",
        *(_compared(entry) for entry in compared["rounds"]),
        "",
        *_paragraph("Not chosen by these rates but by settings, and measured beside what they leave out:"),
        "| what | in place | beside it | in place, it has |",
        "|---|---|---|---|",
        *(_beside(entry) for entry in compared["beside"]),
        "",
        "## Doses",
        "",
        *_paragraph(
            "At strength 1. A range ends at the largest strength tried that kept every budget of calibration prompts:",
            "well-formed answers, the loss of given answers to plain prompts and, for comply edits, the KL of their",
            "first token; the manifest says which, on how many. Comply edits: refusals of the category's own prompts",
            "before and after; refuse edits: refusals of plain prompts before and after; both in percent of",
            "calibration prompts. `loss`: what the dose adds to the next-token loss of given answers to plain prompts,",
            "in nats; of a dose that was lowered to one not tried, what the next larger one tried does.",
        ),
        "| edit | length | before | after | n | loss | largest strength |",
        "|---|---|---|---|---|---|---|",
        *(_dose(key, dose, report["doses"]["unsteered"]["loss"]) for key, dose in report["doses"]["edits"].items()),
        "",
    ]
    if report["left_out"]:
        lines += [*_paragraph("Left out, because no dose kept the budgets: " + ", ".join(report["left_out"]) + ".")]
    return "\n".join(lines)


def _held(held: Mapping[str, Any]) -> list[str]:
    pools = held["pools"]
    arms = [arm for arm in next(iter(pools.values()), {}) if ", " not in arm]
    lines = [
        "## On held prompts",
        "",
        *_paragraph(
            "Share of prompts refused, in percent, with 95 % Wilson intervals; pools count every prompt once.",
            "The judge is the beginning of the greedy answer, through transformers.",
        ),
        "| profile | " + " | ".join(pools) + " |",
        "|---" * (len(pools) + 1) + "|",
        *(f"| {arm} | " + " | ".join(_percent(pool[arm]) for pool in pools.values()) + " |" for arm in arms),
        "",
        "| held set | n | unsteered | refusal-control |",
        "|---|---|---|---|",
    ]
    for name, found in held["sets"].items():
        rates = found["refused"]
        if "refusal-control" in rates:
            cells = f"{_percent(rates['unsteered'])} | {_percent(rates['refusal-control'])}"
            lines.append(f"| {name} | {found['n']} | {cells} |")
    return [*lines, ""]


def _plain(head: Mapping[str, Any], compared: Mapping[str, Any]) -> list[str]:
    """What the head makes of plain prompts; nothing where it does not tell them."""
    told = head.get("plain")
    if not told:
        return []
    groups = told["groups"]
    plain = ", ".join(
        f"{name} {100 * groups[name]['told before']:.1f} → {100 * groups[name]['told']:.1f} % of {groups[name]['n']}"
        for name in PLAIN_GROUPS
        if name in groups
    )
    lost = ", ".join(
        f"{name} {100 * row['told before']:.1f} → {100 * row['told']:.1f} %"
        for name, row in groups.items()
        if name not in PLAIN_GROUPS
    )
    return _paragraph(
        "Prompts that it tells as plain are never edited to comply. Its plain class had its bias raised by",
        f"{told['bias_raised']:.2f}, so that of a group of plain calibration prompts at most",
        f"{100 * told['missed_at_most']:g} % is told as another category: {plain}. Of other prompts it tells as",
        f"plain: {lost}. The default profile edits at most {100 * compared['plain_edited']:.1f} % of a group of",
        "plain calibration prompts. Everyday ones are kept from the fit by their text, of a part that may be trained",
        "on: the demo model has seen them.",
    )


def _response(found: Mapping[str, Any]) -> list[str]:
    if "skipped" in found:
        return ["## The response probe", "", *_paragraph(f"None: {found['skipped']}.")]
    steered = found["answers"]["steered"]
    return [
        "## The response probe",
        "",
        *_paragraph(
            f"Reads the first {found['tokens']} generated tokens at layer {found['layer']} and says whether the answer",
            f"refuses. Labels: {found['labels']}. Fitted on answers with and without the default profile's edits",
            f"({found['answers']['unsteered']} and {steered} generated); on prompts that were left out of it right in",
            f"{_percent(found['accuracy'])} % of {found['accuracy']['n']} answers and in",
            f"{_percent(found['refusals_told'])} % of refusals; calls",
            f"{_percent(found['answers_called_refusals'])} % of other answers refusals. Expected calibration error,",
            "with as many refusals as answers,",
            f"{found['calibration']['balanced']['expected_calibration_error']:.3f}.",
        ),
        "| tokens | best layer | right on held answers, % |",
        "|---|---|---|",
        *(f"| {count} | {row['layer']} | {_percent(row['held'])} |" for count, row in found["by_tokens"].items()),
        "",
    ]


def _compared(entry: Mapping[str, Any]) -> str:
    return f"| {entry['what']} | {_rates(entry, entry['kept'])} | {_rates(entry, entry['lost'])} |"


def _beside(entry: Mapping[str, Any]) -> str:
    cells = (entry["what"], _rates(entry, entry["in_place"]), _rates(entry, entry["beside"]), entry["measured"])
    return "| " + " | ".join(cells) + " |"


def _rates(entry: Mapping[str, Any], name: str) -> str:
    rates = entry["rates"][name]
    text = f"{name}: over-refusal {100 * rates['rates']['over']:.1f}, refusal {100 * rates['rates']['refuse']:.1f}"
    if "plain_loss_added" in rates:
        text += f", loss of plain answers {rates['plain_loss_added']:+.2f}"
    if "plain_edited" in rates:
        text += f", plain prompts edited {100 * rates['plain_edited']:.1f}"
    return text


def _dose(key: str, dose: Mapping[str, Any], unsteered: float) -> str:
    # A dose that was lowered may lie between two that were tried.
    rows = dose["curve"]
    row = next((row for row in rows if row["multiple"] >= dose["multiple"] - 1e-9), rows[-1])
    return (
        f"| {key} | {dose['length']:.1f} | {100 * dose['before']['rate']:.0f} | {100 * dose['refused']['rate']:.0f} "
        f"| {dose['refused']['n']} | {row['loss'] - unsteered:+.2f} | {dose['maximum']:g} |"
    )


def _paragraph(*pieces: str) -> list[str]:
    """The pieces as one paragraph of wrapped lines, and an empty line."""
    return [*textwrap.wrap(" ".join(pieces), 118), ""]


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
