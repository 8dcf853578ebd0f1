"""The report as one self-contained page of HTML: no script, nothing fetched, readable in light and in dark.

Sections take what `report.json` holds; one whose numbers are not there says so or is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from steering.evaluate import plots
from steering.evaluate.arms import AUTO, UNSTEERED
from steering.evaluate.fit_pictures import fit_section
from steering.evaluate.markup import cell, details, figure, list_of, paragraph, signed, table
from steering.evaluate.page_style import STYLE
from steering.evaluate.page_table1 import table1_section
from steering.evaluate.page_topics import table1_topics_section
from steering.evaluate.report import loss_statements
from steering.evaluate.tally import reading_judge

Report = Mapping[str, Any]
CLOSE = 60.0
"""Refusal in percent from which a second drawing of the plane looks closer."""

GROUPS = ("over-refusal", "refusal", "attacks", "topic", "ability")


def write_page(report: Report, path: Path) -> None:
    """Draw the report into a file."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The whole page."""
    title = f"Refusal control on {report['model']}"
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{drawn}</section>" for name, section in SECTIONS if (drawn := section(report))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{_lead(report)}</header>{body}</main></body></html>\n"
    )


def _lead(report: Report) -> str:
    asking = report["asking"]
    prompts = sum(suite["prompts"] for suite in report["suites"].values())
    return paragraph(
        f"{', '.join(report['bundles'])}. {prompts:,} prompts that nothing was fitted on, asked over the served API, "
        f"greedy, at most {asking['max_tokens']} tokens; {_who_judges(report)}. Rates in percent with 95 % Wilson "
        f"intervals. Made {report['made']} with version {report['code']}."
    )


def _who_judges(report: Report) -> str:
    reading = reading_judge(report["judges"])
    decided = f"judge: {report['judge']}"
    return decided if reading is None else f"what is read is judged by {reading}, what is decided by {report['judge']}"


def _read(report: Report) -> str:
    """What a reader of the answers sees, before what the model decides by its first token."""
    reading = reading_judge(report["judges"])
    if reading is None:
        return ""
    arms = [arm for arm in (UNSTEERED, AUTO) if arm in report["pooled"]]
    rows = []
    for group in GROUPS:
        found = {arm: report["pooled"][arm].get(group, {}).get("judges", {}) for arm in arms}
        if not all(reading in told for told in found.values()):
            continue
        counts = sorted({told[reading]["refused"]["n"] for told in found.values()})
        rows.append(
            [
                f"<b>{group}</b>",
                " / ".join(map(str, counts)),
                *(cell(told[reading]["refused"]) for told in found.values()),
                *(cell(told[reading]["broken"]) for told in found.values()),
                *(cell(told[report["judge"]]["refused"]) for told in found.values()),
            ]
        )
    if not rows:
        return ""
    heads = [
        "",
        "n",
        *(f"{what}, {arm}" for what in ("read as a refusal", "broken text", "decided to refuse") for arm in arms),
    ]
    words = (
        f"Read: the text as {reading} judges it, broken text being no refusal. Decided: by {report['judge']}. Every "
        "table and picture below whose judge is not named is of what is decided."
    )
    return table(heads, rows) + paragraph(words)


def _claims(report: Report) -> str:
    if not report["claims"]:
        return paragraph("The server has no gate, so that nothing can be said of auto.")
    reading = reading_judge(report["judges"])
    told = ""
    if reading is not None and report.get("claims_read"):
        told += f"<h3>As read, by {reading}</h3>" + _claim_table(report["claims_read"])
    if reading is not None:
        told += f"<h3>As decided, by {report['judge']}</h3>"
    told += _claim_table(report["claims"]) + list_of(loss_statements(report))
    return told + paragraph("Differences are paired by prompt (Newcombe's method 10, McNemar's exact p).")


def _claim_table(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for claim in claims:
        facts = claim["facts"]
        rows.append(
            [
                '<span class="yes">shown</span>' if claim["is_shown"] else '<span class="no">not shown</span>',
                escape(claim["text"]),
                cell(facts["second"]),
                cell(facts["first"]),
                signed(facts),
                "touch" if facts["intervals_touch"] else "do not touch",
            ]
        )
    heads = ["", "auto against unsteered, same prompts", "unsteered", "auto", "difference in points", "intervals"]
    return table(heads, rows)


def _plane(report: Report) -> str:
    drawn, names = plots.plane(report)
    if not drawn:
        return ""
    listed = "".join(f"<li>{escape(name)}</li>" for name in names)
    says = (
        "Pooled over the suites of either group. Small dots: auto under other thresholds, asked for. Dashed: every "
        "threshold, put together by each prompt's score from its answers steered either way and unsteered (blue: one "
        "threshold, P1's hard sign; green: comply below it, never add a refusal; pink: R1's threshold on the first "
        "token, whose decision is forced)."
    )
    near, _ = plots.plane(report, lowest=CLOSE)
    return figure(f'{drawn}<ol class="legend">{listed}</ol>', says) + figure(
        near, f"The same from {CLOSE:g} % of refusal upwards, numbered alike."
    )


def _groups(report: Report) -> str:
    rows = []
    for arm, facts in report["arms"].items():
        by_group = report["pooled"].get(arm, {})
        broken = [
            by_group[group]["broken_text"] for group in GROUPS if by_group.get(group, {}).get("broken_text") is not None
        ]
        share = (
            f"{100 * sum(one['count'] for one in broken) / sum(one['n'] for one in broken):.1f}"
            if broken and sum(one["n"] for one in broken)
            else "n/a"
        )
        rates = [cell(plots.rate_of(by_group.get(group), report["judge"])) for group in GROUPS]
        rows.append([f'<b title="{escape(facts["what"], quote=True)}">{escape(arm)}</b>', *rates, share])
    skipped = list_of([f"{name}: {why}" for name, why in report["skipped"].items()])
    empty = list_of([f"{name}: {why}" for name, why in report["left_out"].items()])
    return (
        paragraph(f"Refused, by {report['judge']}; broken text of the answers that were read whole.")
        + table(["arm", *GROUPS, "broken text"], rows)
        + details("What each arm is", list_of([f"{arm}: {facts['what']}" for arm, facts in report["arms"].items()]))
        + (details("Arms that were skipped", skipped) if skipped else "")
        + (details("Suites without prompts", empty) if empty else "")
    )


def _against(report: Report) -> str:
    told = ""
    for group in GROUPS[:4]:
        entries = [(arm, found[group]) for arm, found in report["against_unsteered"].items() if group in found]
        drawn = plots.differences(entries, is_more_better=group not in {"over-refusal", "topic"})
        better = "green is fewer" if group == "topic" else "green is for the better"
        told += figure(drawn, f"{group}: refusals minus those of unsteered, same prompts; {better}")
    return told


def _suites(report: Report) -> str:
    told = ""
    for group in GROUPS:
        names = [name for name, suite in report["suites"].items() if suite["group"] == group]
        arms = [arm for arm, found in report["results"].items() if any(name in found for name in names)]
        if not names or not arms:
            continue
        rows = [
            [
                escape(arm),
                *(cell(plots.rate_of(report["results"][arm].get(name), report["judge"])) for name in names),
            ]
            for arm in arms
        ]
        told += details(f"{group}: refused, by suite and arm", table(["arm", *names], rows), is_open=group == GROUPS[0])
    return told + details("What was not answered", _failures(report))


def _failures(report: Report) -> str:
    rows = []
    for arm, by_suite in report["results"].items():
        for suite, tallied in by_suite.items():
            if tallied["too_long"] or tallied["failed"]:
                failed = ", ".join(f"{code} × {count}" for code, count in tallied["failed"].items())
                rows.append([escape(arm), suite, str(tallied["asked"]), str(tallied["too_long"]), escape(failed)])
    heads = ["arm", "suite", "asked", "longer than the served context", "failed"]
    return table(heads, rows) if rows else paragraph("Everything was answered.")


def _probe(report: Report) -> str:
    probe = report["probe"]
    if not probe:
        return paragraph("No scores: the server has no gate, or auto was not asked.")
    groups = {name: suite["group"] for name, suite in report["suites"].items()}
    calibration = probe["calibration"]
    quality = (
        f"Calibration of refusal against over-refusal prompts: Brier {calibration['brier']}, expected error "
        f"{calibration['ece']}. Shares depend on how many prompts of either kind the suites have."
        if calibration["brier"] is not None
        else ""
    )
    return (
        figure(plots.histograms(probe["histograms"], groups), "Each row is scaled to its own highest bar.")
        + '<div class="side">'
        + figure(plots.roc_curves(probe["roc"]), "Area under the curve in the legend.")
        + figure(plots.calibration_curve(calibration["bins"]), quality)
        + "</div>"
    )


def _gate(report: Report) -> str:
    return figure(plots.decisions(report["gate"]), "What the gate of the default profile decided.")


def _categories(report: Report) -> str:
    told = report["categories"]
    out = ""
    if told["agreement"]:
        pooled = told["agreement"]["pooled"]
        out += paragraph(
            f"The probe's category head and the model's refusal tokens (first of two passes, arm "
            f"{told['agreement']['tokens_by']}) name the same category for {cell(pooled)} % of harmful prompts "
            f"(n = {pooled['n']}): "
            + ", ".join(f"{name} {cell(rate)}" for name, rate in told["agreement"]["suites"].items())
            + ".",
            is_markup=True,
        )
    for source, found in told["confusion"].items():
        name = "the probe's head" if source == "probe" else "the model's own refusals"
        drawn = plots.heatmap(found["labels"], found["names"], found["counts"])
        out += figure(
            drawn, f"CoCoNot's label against {name}: equal for {found['right']['count']} of {found['right']['n']}."
        )
    rows = [
        [f"auto − {escape(other)}", group, cell(facts["first"]), cell(facts["second"]), signed(facts)]
        for other, by_group in told["choosing"].items()
        for group, facts in by_group.items()
    ]
    if rows:
        out += table(["what choosing adds", "group", "auto", "the other", "difference in points"], rows)
        small = all(
            facts["low"] <= 0 <= facts["high"] for by_group in told["choosing"].values() for facts in by_group.values()
        )
        out += paragraph(
            "R4 (arXiv 2602.02132) finds that directions of different categories do nearly the same. "
            + ("So it is here: no interval excludes zero." if small else "Here at least one interval excludes zero.")
        )
    return out


def _ability(report: Report) -> str:
    rows = []
    for arm, found in report["ability"].items():
        for name, facts in {"all": found["pooled"], **found["suites"]}.items():
            rows.append(
                [
                    escape(arm),
                    escape(name),
                    cell(facts["identical"]),
                    _mean(facts["similarity"], 100),
                    cell(facts.get("refused", {}).get("second")),
                    cell(facts.get("refused", {}).get("first")),
                    _mean(facts.get("loss_change"), 1),
                ]
            )
    heads = [
        "arm",
        "plain benign prompts",
        "same text as unsteered",
        "words in common, %",
        "refused unsteered",
        "refused",
        "change of the answer's own loss, nats a token",
    ]
    told = table(heads, rows) if rows else ""
    losses = report.get("reference_loss") or {}
    if losses:
        rows = [
            [
                escape(name),
                _mean(found["unsteered"], 1),
                _mean(found["change"], 1),
                _mean(found["change_where_edited"], 1),
            ]
            for name, found in losses.items()
        ]
        heads = ["reference answers of", "loss unsteered, nats a token", "change under auto", "change where edited"]
        told += table(heads, rows) + paragraph(next(iter(losses.values()))["what"] + ".")
    return told


def _judges(report: Report) -> str:
    told = ""
    for name, facts in report["judges"].items():
        if "error" in facts:
            told += paragraph(f"{name}: {facts['error']}.")
        else:
            partial = facts.get("without_partial")
            told += paragraph(
                f"<b>{escape(name)}</b>, {escape(facts['against'])}: right in {cell(facts['accuracy'])} % of "
                f"{facts['accuracy']['n']:,}; refusal said of answers {cell(facts['false_positives'])} %, answer said "
                f"of refusals {cell(facts['false_negatives'])} %"
                + (f"; without partial refusals right in {cell(partial)} %" if partial else "")
                + f". {escape(facts.get('caveat', ''))}",
                is_markup=True,
            )
        here = facts.get("on_this_model")
        if here:
            told += paragraph(
                f"The same against {escape(here['against'])}: right in {cell(here['accuracy'])} % of "
                f"{here['accuracy']['n']:,}; refusal said of answers {cell(here['false_positives'])} %, none said of "
                f"refusals {cell(here['false_negatives'])} %.",
                is_markup=True,
            )
    return told + details("Rates under every judge", _under_judges(report))


def _under_judges(report: Report) -> str:
    names = [
        name for name in ("refusal_token", "llm", "response_probe", "wording", "keyword") if name in report["judges"]
    ]
    rows = []
    for arm, by_group in report["pooled"].items():
        for group, tallied in by_group.items():
            cells = []
            for name in names:
                found = tallied["judges"].get(name)
                cells.append(cell(found["refused"]) if found else "n/a")
                cells.append(f"{100 * found['broken']['rate']:.1f}" if found else "n/a")
            rows.append([escape(arm), group, *cells])
    heads = ["arm", "group", *(head for name in names for head in (f"refused: {name}", "broken"))]
    return table(heads, rows)


def _cast(report: Report) -> str:
    facts = report.get("cast")
    if not facts:
        return ""
    shares = ", ".join(f"{name} {fired} of {known}" for name, (fired, known) in facts["fired_of"].items())
    return paragraph(
        f"Layer {facts['layer']}, fires {facts['fires']} {facts['threshold']:g}; F1 {facts['f1_where_fitted']} on the "
        f"{facts['prompts_of_either_kind']} prompts of either kind it was chosen on. Similarity: "
        f"{facts.get('similarity') or 'as printed'}. Computed {facts['computed']}. "
        f"Fired: {shares}."
    )


def _mean(facts: Mapping[str, Any] | None, scale: float) -> str:
    if not facts:
        return "n/a"
    digits = 1 if scale > 1 else 3
    return (
        f"{scale * facts['mean']:.{digits}f} <small>[{scale * facts['low']:.{digits}f}, "
        f"{scale * facts['high']:.{digits}f}]</small>"
    )


SECTIONS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("What is read, and what is decided", _read),
    ("Does it do what it is for?", _claims),
    ("Refusal against over-refusal", _plane),
    ("All arms", _groups),
    ("Against unsteered", _against),
    ("By suite", _suites),
    ("What the gate decided", _gate),
    ("The probe on held prompts", _probe),
    ("Categories", _categories),
    ("Ability", _ability),
    ("CAST's condition", _cast),
    ("How it was fitted", fit_section),
    ("P1's Table 1", table1_section),
    (
        "P2's Table 1",
        lambda report: table1_topics_section(report["table1_topics"]) if "table1_topics" in report else "",
    ),
    ("Judges and their errors", _judges),
)
