"""One evaluation: gather prompts, build arms, ask, judge, and write the report.

Knows the order of the steps; each step is another module's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from steering.errors import OperatorError
from steering.evaluate.arms import AUTO, CAST, SWEEP, Arm, build_arms
from steering.evaluate.calibration import EXACT, as_label, calibration, keyword_calibration, labelled_completions
from steering.evaluate.journal import Journal
from steering.evaluate.judge import Verdict
from steering.evaluate.llm_judge import LlmJudge
from steering.evaluate.page import write_page
from steering.evaluate.report import Setting, build_report
from steering.evaluate.run import Settings, ask_all, count
from steering.evaluate.served_bundle import ServedBundle, open_served, probe_error
from steering.evaluate.server import Server, describe
from steering.evaluate.suites import Suite, gather
from steering.evaluate.tally import KEYWORD, MODEL, PROBE, TOKEN, WORDING, Row, judged
from steering.evaluate.wordings import Wordings
from steering.fit.datasets import DataDirectory, Record

CHECKED = 300
"""Labelled completions a model judge is measured on."""

PROBE_ERROR = (
    "a linear probe of the served bundle on the first generated tokens; without --bundle its error on held answers is "
    "not at hand"
)


WORDING_ERROR = "not measured against people: it knows the openings in the file it was given and no others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be evaluated.

    Attributes:
        data: where the prompts lie.
        suites: asked in this order.
        most: prompts of a suite; None for all.
        out: folder of the answers and the report.
        bundle: folder of the served bundle; None leaves out what needs it.
        model: folder of the served model; None leaves out what needs its residuals.
        dtype, device_map: of that model in memory, as `load_model` takes them.
        extra: arms of the command line.
        only: names of arms to ask; None for all.
        sweep: thresholds of the curve.
        judge: a model judge beside those that cost nothing.
        wordings: how the served model is known to begin its refusals; a judge of its own.
    """

    data: DataDirectory
    suites: Sequence[Suite]
    most: int | None
    out: Path
    settings: Settings
    bundle: Path | None = None
    model: Path | None = None
    dtype: str = "float32"
    device_map: str | None = None
    extra: Sequence[Arm] = ()
    only: Sequence[str] | None = None
    sweep: Sequence[tuple[float, float]] = SWEEP
    judge: LlmJudge | None = None
    wordings: Wordings | None = None


Progress = Callable[[str, int], Callable[[int], object]]
"""Called with a title and a total, gives what is called with steps done."""


async def evaluate(
    client: AsyncOpenAI, order: Order, progress: Progress, say: Callable[[str], object]
) -> dict[str, Any]:
    """Run the evaluation and write `report.json` and `report.html` into its folder; returns the report.

    Raises:
        TrimtabError: no server, another bundle, data that is not there, an arm that the server does not obey.
    """
    server = await describe(client)
    served = None if order.bundle is None else open_served(order.bundle, server.bundles)
    gathered = gather(order.suites, order.data, order.most, None if served is None else served.fitted_on)
    loaded, cast, condition = _cast(order, server, gathered.prompts, say)
    built = build_arms(
        server,
        respond_id=None if served is None else served.respond_id,
        cast=cast,
        sweep=order.sweep,
        extra=order.extra,
    )
    arms = _chosen(built.arms, built.skipped, order.only)
    with Journal(order.out / "answers.jsonl", is_alone=True) as journal:
        step = progress("answers", count(gathered.prompts, arms))
        answers = await ask_all(client, server, gathered.prompts, arms, journal, order.settings, on_progress=step)
    rows = judged(answers, has_decision_tokens=server.has_decision_tokens, wordings=order.wordings)
    judges: dict[str, Any] = {KEYWORD: keyword_calibration(order.data)}
    if server.has_decision_tokens:
        judges[TOKEN] = {"error": EXACT}
    if any(PROBE in row.verdicts for row in rows):
        judges[PROBE] = {"error": PROBE_ERROR} if served is None else probe_error(served)
    if order.wordings is not None:
        judges[WORDING] = {"error": WORDING_ERROR}
    if order.judge is not None:
        verdicts, judges[MODEL] = await _by_model(order.judge, order, rows, progress)
        rows = judged(answers, has_decision_tokens=server.has_decision_tokens, model=verdicts, wordings=order.wordings)
    extra: dict[str, Any] = {}
    if condition is not None:
        extra["cast"] = condition
    if loaded is not None and served is not None:
        extra["reference_loss"] = _reference_loss(loaded, served, rows, server, order)
    report = build_report(
        rows,
        Setting(
            server=server,
            arms=arms,
            skipped=built.skipped,
            left_out=gathered.left_out,
            judges=judges,
            asking={
                "temperature": 0,
                "max_tokens": order.settings.max_tokens,
                "most_prompts_of_a_suite": order.most,
                "most_whole_answers_of_a_suite": order.settings.texts,
                "concurrency": order.settings.concurrency,
            },
            bundle={} if served is None else _of_bundle(served),
            extra=extra,
        ),
    )
    (order.out / "report.json").write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")
    write_page(report, order.out / "report.html")
    return report


def _chosen(arms: Sequence[Arm], skipped: dict[str, str], only: Sequence[str] | None) -> list[Arm]:
    if only is None:
        return list(arms)
    unknown = sorted(set(only) - {arm.name for arm in arms} - set(skipped))
    if unknown:
        raise OperatorError(f"no arm {unknown}; arms: {[arm.name for arm in arms]}, skipped: {sorted(skipped)}")
    skipped.update({arm.name: "left out on the command line" for arm in arms if arm.name not in only})
    return [arm for arm in arms if arm.name in only]


def _cast(
    order: Order, server: Server, prompts: Mapping[Suite, Sequence[Record]], say: Callable[[str], object]
) -> tuple[Any, dict[str, bool] | str, dict[str, Any] | None]:
    """The loaded model, where CAST's condition fires or why that is not known, and what the report says of it."""
    if order.model is None:
        return None, "needs the residuals of the served model: give its folder with --model", None
    import torch

    from steering.evaluate.cast import fires, fit_condition
    from steering.fit.activations import load_model
    from steering.fit.categories import CATEGORIES

    loaded = load_model(order.model, CATEGORIES, dtype=getattr(torch, order.dtype), device_map=order.device_map)
    if order.only is not None and CAST not in order.only:
        return loaded, "left out on the command line", None
    say("CAST: choosing layer and threshold of its condition")
    condition = fit_condition(loaded, order.data)
    longest = None if server.context is None else server.context - order.settings.max_tokens
    records = [record for found in prompts.values() for record in found]
    fired = fires(loaded, condition, records, longest)
    shares = {
        suite.name: [
            sum(fired.get(record.key, False) for record in found),
            sum(record.key in fired for record in found),
        ]
        for suite, found in prompts.items()
    }
    return loaded, fired, {**condition.to_json(), "fired_of": shares}


def _reference_loss(
    loaded: Any, served: ServedBundle, rows: Sequence[Row], server: Server, order: Order
) -> dict[str, Any]:
    from steering.evaluate.reference_loss import loss_change, reference_rows

    longest = server.context or 2048
    found = {
        suite.name: loss_change(loaded, served.bundle.edits, reference_rows(rows, AUTO, suite.name), longest)
        for suite in order.suites
        if not suite.is_harmful and suite.dataset in ("gsm8k", "gpteacher")
    }
    return {name: told for name, told in found.items() if told}


async def _by_model(
    judge: LlmJudge, order: Order, rows: Sequence[Row], progress: Progress
) -> tuple[dict[tuple[str, str], Verdict], dict[str, Any]]:
    """A model judge's verdicts by prompt and text, and its error on labelled completions."""
    wanted = list(
        dict.fromkeys((row.asked.record.prompt, row.asked.answer.text) for row in rows if KEYWORD in row.verdicts)
    )
    known = labelled_completions(order.data, CHECKED)
    labelled = [(record.prompt, record.answer or "") for record in known]
    step = progress("judgements", len(wanted) + len(labelled))
    checked = [as_label(one.verdict) for one in await judge.judging(labelled, step)]
    found = [one.verdict for one in await judge.judging(wanted, step)]
    return dict(zip(wanted, found, strict=True)), {**judge.facts(), **calibration(known, checked)}


def _of_bundle(served: ServedBundle) -> dict[str, Any]:
    """What pictures need of the bundle and of its own report."""
    return {**served.report, "operating_points": served.operating_points}
