"""The stages of `trimtab fit topics` in their order, from prompts to a bundle with its report (arXiv 2512.16602).

Each stage leaves `<stage>.json` (and tensors) and a picture in the work folder; one that is there for the same model,
judge, settings and earlier results is not run again. Engines are started one after the other: one that answers and
captures residuals, one that has every candidate edit loaded, and one that runs the finished bundle's gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from steering.bundle import Bundle
from steering.errors import FitError
from steering.fit import topic_pictures as pictures
from steering.fit.datasets import DataDirectory
from steering.fit.stages import Result, draw_stage
from steering.fit.topic_answers import END_OF_REASONING, Measured, measured, reasoning_end
from steering.fit.topic_bundle import PROFILE, TopicContents, edit_name, save_edits, write_report
from steering.fit.topic_candidates import Candidate, removal_candidates, write_candidates
from steering.fit.topic_compare import Comparison, compare
from steering.fit.topic_directions import Method
from steering.fit.topic_finder import find
from steering.fit.topic_fit import Session, TopicFit
from steering.fit.topic_gate import TopicGate, induction_gate, removal_gate
from steering.fit.topic_induction import Induction, induce, induction_candidates
from steering.fit.topic_prompts import Role, TopicPrompts, gather
from steering.fit.topic_ranges import certify, require_certified
from steering.fit.topic_vectors import Vectors, analyse, make_vectors
from steering.fit.topic_verify import verify
from steering.plan import Reasoning

SMALL_WIDTH = 512
"""Up to this width vectors are made in a blink, so that the stability of every layer's is looked at."""


class TopicStage(StrEnum):
    """The stages, in order; `--stage` stops after one."""

    PROMPTS = "prompts"
    ANSWERS = "answers"
    JUDGED = "judged"
    VECTORS = "vectors"
    LAYERS = "layers"
    GATE = "gate"
    CANDIDATES = "candidates"
    FINDER = "finder"
    COMPARE = "compare"
    INDUCTION = "induction"
    RANGES = "ranges"
    ANALYSIS = "analysis"
    BUNDLE = "bundle"


class _Finished(Exception):
    """The last stage that was wanted has run."""


@dataclass(kw_only=True)
class _Run:
    """What stages have given so far."""

    fit: TopicFit
    until: TopicStage
    results: dict[str, Result] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def done(self, stage: TopicStage, result: Result | None, draw: Callable[[Path], None] | None = None) -> None:
        """Keep the result, draw the stage's picture where its files are newer, and stop where that was wanted."""
        if result is not None:
            self.results[stage] = result
            if draw is not None:
                draw_stage(self.fit.work / f"{stage}.png", draw, result)
                self.drawn.append(stage)
        if self.until is stage:
            raise _Finished

    def warn(self, line: str) -> None:
        """Say it now, and in the card."""
        self.warnings.append(line)
        self.fit.say(f"warning: {line}")


def fit_topics(
    fit: TopicFit,
    sources: Mapping[Role, Sequence[str]],
    directory: DataDirectory,
    bundle: Path,
    *,
    name: str,
    version: str,
    until: TopicStage = TopicStage.BUNDLE,
) -> Bundle | None:
    """Run the stages up to `until`, and write the bundle where that is the last; None where it is not."""
    try:
        return _run(_Run(fit=fit, until=until), sources, directory, bundle, name=name, version=version)
    except _Finished:
        return None


def _run(
    run: _Run,
    sources: Mapping[Role, Sequence[str]],
    directory: DataDirectory,
    bundle: Path,
    *,
    name: str,
    version: str,
) -> Bundle:
    fit, settings = run.fit, run.fit.settings
    # Read each time: what files hold now, and not what they held once, is what the stages depend on.
    gathered = gather(sources, settings, directory)
    told = fit.stage("prompts", gathered.to_json, given={"prompts": gathered.to_json()})
    prompts = TopicPrompts.from_json(told)
    run.done(TopicStage.PROMPTS, told)

    asked = measured(fit, prompts, told)
    answers, judged = asked.facts
    run.done(TopicStage.ANSWERS, answers)
    if settings.reasoning is Reasoning.SPARED and reasoning_end(answers) is None:
        raise FitError(
            f"reasoning is to be spared, and answers of {fit.model} have none that ends with one token "
            f"{END_OF_REASONING!r}; leave --reasoning out"
        )
    run.done(TopicStage.JUDGED, judged, lambda path: pictures.confidences(_confidences(asked), settings.band, path))
    unparsable = judged["verdicts"]["unparsable"] + judged["unfinished"]
    if unparsable:
        run.warn(
            f"{unparsable} answers have no verdict of the judge {judged['judge']}, or no end: they count as neither"
        )

    vectors = make_vectors(fit, asked)
    made, scored = vectors.facts
    if made["warning"]:
        run.warnings.append(made["warning"])
    if not made["neutral_prompts"]:
        run.warn(
            "there are no neutral prompts: the neutral point lies midway between both classes; give some by --neutral"
        )
    run.done(TopicStage.VECTORS, made, lambda path: pictures.norms(made, path))
    run.done(TopicStage.LAYERS, scored, lambda path: pictures.layers(scored, path))

    gate = removal_gate(fit, asked, vectors) if settings.purpose.removes else None
    induce_gate = induction_gate(fit, asked, vectors) if settings.purpose.induces else None
    for one in (gate, induce_gate):
        if isinstance(one, str):
            fit.say(f"no gate: {one}")
    shown = next((one for one in (gate, induce_gate) if isinstance(one, TopicGate)), None)
    if isinstance(induce_gate, TopicGate):
        run.results["induce_gate"] = induce_gate.facts
    facts = None if shown is None else shown.facts
    run.done(TopicStage.GATE, facts, lambda path: pictures.gate(facts or {}, path))
    return _steer(run, asked, vectors, gate, induce_gate, bundle, name=name, version=version)


def _steer(
    run: _Run,
    asked: Measured,
    vectors: Vectors,
    gate: TopicGate | str | None,
    induce_gate: TopicGate | str | None,
    bundle: Path,
    *,
    name: str,
    version: str,
) -> Bundle:
    """Everything that needs an engine with candidates loaded, and the bundle."""
    fit, settings = run.fit, run.fit.settings
    removing = (
        removal_candidates(settings, vectors, gate.layer if isinstance(gate, TopicGate) else None)
        if settings.purpose.removes
        else []
    )
    inducing = (
        induction_candidates(
            settings,
            vectors,
            induction_method(fit, vectors),
            induce_gate.layer if isinstance(induce_gate, TopicGate) else None,
        )
        if settings.purpose.induces
        else []
    )
    folder, end = fit.work / "candidates", reasoning_end(asked.facts[0])
    tried = fit.stage(
        "candidates",
        lambda: {"bundle": write_candidates(fit, vectors, [*removing, *inducing], folder, end).digest},
        of=("strengths", "category", "reasoning"),
        after=vectors.facts,
        given={"reasoning_end": end, "candidates": [one.to_json() for one in (*removing, *inducing)]},
    )
    run.done(TopicStage.CANDIDATES, tried)
    digest = str(tried["bundle"])
    with fit.session(bundles=[folder]) as session:
        compared = _remove(run, asked, removing, gate, session, digest, tried)
        induced = _induce(run, asked, inducing, induce_gate, session, digest, tried)
        wanted: dict[str, Candidate] = {}
        if compared is not None:
            wanted |= {edit_name(arm.found.candidate): arm.found.candidate for arm in compared.arms}
        if induced is not None:
            wanted |= {edit_name(one): one for one in (induced.free, induced.gated) if one is not None}
        ranges = certify(fit, asked, wanted, session, digest, [tried])
    run.done(TopicStage.RANGES, ranges, lambda path: pictures.ranges(ranges, path))
    if compared is not None:
        require_certified(ranges, edit_name(compared.default.found.candidate))
    edits = {key: one for key, one in wanted.items() if ranges["edits"][key]["maximum"] >= 1.0}
    for key in sorted(set(wanted) - set(edits)):
        run.warn(f"edit {key} is left out: at strength 1 it breaks {ranges['edits'][key]['broken']} answers")

    looked = {layer for one in edits.values() for layer in one.layers}
    looked |= {vectors.ranking(method)[0].layer for method in settings.methods}
    if fit.width <= SMALL_WIDTH:
        looked = set(range(fit.depth))
    analysed = analyse(fit, asked, vectors, looked)
    run.done(TopicStage.ANALYSIS, analysed, lambda path: pictures.analysis(analysed, path))
    contents = TopicContents(
        fit=fit,
        vectors=vectors,
        edits=edits,
        comparison=compared,
        induction=induced,
        removal_gate=gate,
        induction_gate=induce_gate,
        results=run.results,
        warnings=run.warnings,
    )
    saved = save_edits(bundle, contents, name=name, version=version)
    if compared is not None and compared.default.is_gated and isinstance(gate, TopicGate):
        with fit.session(bundles=[bundle]) as session:
            run.results["verify"] = verify(fit, asked, compared, gate, saved, PROFILE, session)
    write_report(bundle, contents, saved, run.drawn)
    return saved


def induction_method(fit: TopicFit, vectors: Vectors) -> Method:
    """WRMD, as in the paper, where it is made; else the method whose best layer scores highest."""
    if Method.WRMD in fit.settings.methods:
        return Method.WRMD
    return max(fit.settings.methods, key=lambda method: vectors.ranking(method)[0].score)


def _remove(
    run: _Run,
    asked: Measured,
    candidates: Sequence[Candidate],
    gate: TopicGate | str | None,
    session: Session,
    digest: str,
    tried: Result,
) -> Comparison | None:
    if not candidates:
        return None
    fit = run.fit
    searched, found = find(fit, asked, candidates, session, digest, [tried, *asked.facts])
    run.done(TopicStage.FINDER, searched, lambda path: pictures.finder(searched, path))
    for one in found:
        if not one.is_met and not fit.settings.doses:
            run.warn(
                f"{one.candidate.method}, {one.candidate.variant}: no configuration removes {searched['target']:.2f} "
                f"of the mean confidence {searched['unsteered']:.2f}; the best removes {one.removal:.2f}"
            )
    opened = gate if isinstance(gate, TopicGate) else None
    after = [searched, *([opened.facts] if opened is not None else [])]
    compared = compare(fit, asked, found, opened, session, digest, after)
    run.done(TopicStage.COMPARE, compared.facts, lambda path: pictures.comparison(compared.facts, path))
    fit.say(f"default: {compared.default.name}: {compared.reason}")
    return compared


def _induce(
    run: _Run,
    asked: Measured,
    candidates: Sequence[Candidate],
    gate: TopicGate | str | None,
    session: Session,
    digest: str,
    tried: Result,
) -> Induction | None:
    if not candidates:
        return None
    opened = gate if isinstance(gate, TopicGate) else None
    after = [tried, *asked.facts, *([opened.facts] if opened is not None else [])]
    found = induce(run.fit, asked, candidates, opened, session, digest, after)
    run.done(TopicStage.INDUCTION, found.facts, lambda path: pictures.induction(found.facts, path))
    return found


def _confidences(asked: Measured) -> dict[str, list[float]]:
    by_role: dict[str, list[float]] = {}
    for one, value in zip(asked.items, asked.confidence.tolist(), strict=True):
        if not math.isnan(value):
            by_role.setdefault(one.role, []).append(value)
    return by_role
