"""Stage `finder`: the configuration with the least shift among those that remove enough (P2, §3.3).

    removal  Δc = E[c] - E[c_g] on refused calibration prompts, judged
    shift    L = E|Δ(x)|, Δ = steered - unsteered mean log-probability of a fixed answer, on answered conversations

Removal is first measured on a few prompts for every configuration, and the shift on a few for those that look as if
they removed enough. These are then measured on all prompts, a wave of each method at a time by rising shift, until a
wave holds one that does remove enough: the choice is the least shift among all that were measured and do. What lies
beyond that wave is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.engine.asks import Ask, EditOrder
from steering.errors import TooFewPrompts
from steering.evaluate.confidence import label, score
from steering.evaluate.judge import Verdict
from steering.fit.datasets import thinned
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_answers import Measured, end_of_reasoning, segment_logprob
from steering.fit.topic_candidates import Candidate
from steering.fit.topic_fit import Case, Engine, Session, TopicFit, cases_of
from steering.fit.topic_prompts import Role

SCREENED = 16
"""Prompts on which either signal is measured first."""
NEAR = 0.75
"""Share of the target that a configuration must reach there to be measured on all prompts."""
MOST_ASKS = 8192
"""Asks of one batch."""
_NOTHING_FIXED = (
    "no answered calibration prompt has an answer that a shift can be measured on: the model refuses all of them, or "
    "finishes none; give more prompts by --answered, or more --max-tokens"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the finder chose for one method and variant.

    Attributes:
        removal, shift: Δc and L of the choice.
        is_met: it removes enough; else it is what removes most.
    """

    candidate: Candidate
    removal: float
    shift: float
    is_met: bool


def find(
    fit: TopicFit,
    measured: Measured,
    candidates: Sequence[Candidate],
    session: Session,
    digest: str,
    after: Sequence[Mapping[str, Any]],
) -> tuple[Result, list[Found]]:
    """Run or read the stage.

    Args:
        digest: of the bundle of candidates, which the session's engine has loaded.
        after: results it depends on.
    """
    result = fit.stage(
        "finder",
        lambda: _find(fit, measured, candidates, session.engine, digest),
        of=("removal", "shift_prompts", "finder_prompts", "finder_samples", "wave", "temperature", "max_tokens", "tau"),
        after=after,
        given={"judge": fit.judge_facts, "candidates": [one.to_json() for one in candidates]},
    )
    found = [
        Found(
            candidate=candidates[one["candidate"]],
            removal=one["removal"],
            shift=one["shift"],
            is_met=one["is_met"],
        )
        for one in result["chosen"]
    ]
    return result, found


def answer_tokens(fit: TopicFit) -> int:
    """Tokens of an answer that is only judged: a judge of first tokens needs no more than one."""
    return 1 if fit.judge.name == "token" else fit.settings.max_tokens


def verdicts(
    fit: TopicFit,
    name: str,
    engine: Engine,
    orders: Sequence[tuple[str, EditOrder | None]],
    *,
    max_tokens: int | None = None,
) -> list[Verdict]:
    """The judge on one greedy answer to each (prompt, edit).

    Raises:
        OperatorError: the judge is out of reach.
    """
    cases: list[Case] = []
    limit = max_tokens or answer_tokens(fit)
    ids = dict(
        zip(texts := list(dict.fromkeys(text for text, _ in orders)), fit.prompt_ids(engine, texts), strict=True)
    )
    for chosen in _batches(orders):
        asks = [Ask(prompt=ids[text], max_tokens=limit, edit=order) for text, order in chosen]
        answers = fit.ask(name, engine, asks)
        cases += [case for (text, _), answer in zip(chosen, answers, strict=True) for case in cases_of(text, answer)]
    return [one.verdict for one in fit.judged(cases)]


def shifts(
    fit: TopicFit, measured: Measured, engine: Engine, orders: Sequence[EditOrder], most: int
) -> tuple[list[float], int]:
    """L of each edit, in order, and on how many conversations."""
    fixed = thinned(measured.fixed, most)
    if not fixed:
        raise TooFewPrompts(_NOTHING_FIXED)
    ids = fit.prompt_ids(engine, [measured.items[one.row].text for one in fixed])
    end = end_of_reasoning(engine)

    def read(order: Sequence[EditOrder | None]) -> list[list[float | None]]:
        asks = [
            Ask(prompt=prompt, answer=one.tokens, edit=edit)
            for edit in order
            for prompt, one in zip(ids, fixed, strict=True)
        ]
        told = [
            segment_logprob(answer.given or (), ask.answer or (), end, thinks=measured.thinks)
            for chosen in _batches(asks)
            for ask, answer in zip(chosen, fit.ask("shift", engine, chosen), strict=True)
        ]
        return [told[start : start + len(fixed)] for start in range(0, len(told), len(fixed))]

    base, *steered = read([None, *orders])
    if not any(value is not None for value in base):
        raise TooFewPrompts(_NOTHING_FIXED)
    found = []
    for values in steered:
        gaps = [abs(here - there) for here, there in zip(values, base, strict=True) if None not in (here, there)]  # type: ignore[operator]
        found.append(sum(gaps) / len(gaps))
    return found, sum(value is not None for value in base)


def _find(fit: TopicFit, measured: Measured, candidates: Sequence[Candidate], engine: Engine, digest: str) -> Result:
    settings = fit.settings
    orders = [one.order(digest) for one in candidates]
    texts = _refused(fit, measured)
    few = texts[:SCREENED]
    base = _confidences(fit, engine, [(text, None) for text in texts])
    unsteered = sum(base) / len(base)
    # All there is to remove is E[c] + 1: every prompt answered for certain.
    target = settings.removal * (unsteered + 1.0)
    screened = _removals(fit, engine, few, orders, sum(base[: len(few)]) / len(few))
    groups: dict[tuple[str, str], list[int]] = {}
    for index, one in enumerate(candidates):
        groups.setdefault((one.variant, one.method), []).append(index)
    promising = {key: _promising(members, screened, target) for key, members in groups.items()}
    looked = [index for members in promising.values() for index in members]
    lengths, _ = shifts(
        fit, measured, engine, [orders[index] for index in looked], min(SCREENED, settings.shift_prompts)
    )
    rough = dict(zip(looked, lengths, strict=True))
    waiting = {key: sorted(members, key=lambda index: (rough[index], index)) for key, members in promising.items()}
    removal: dict[int, float] = {}
    moved: dict[int, float] = {}
    conversations = 0
    chosen: dict[tuple[str, str], int] = {}
    while any(waiting.values()):
        wave = [(key, index) for key, members in waiting.items() for index in members[: settings.wave]]
        chances = [orders[index] for _, index in wave]
        removals = _removals(fit, engine, texts, chances, unsteered)
        lengths, conversations = shifts(fit, measured, engine, chances, settings.shift_prompts)
        for (_, index), removed, length in zip(wave, removals, lengths, strict=True):
            removal[index], moved[index] = removed, length
        for key, members in waiting.items():
            now, waiting[key] = members[: settings.wave], members[settings.wave :]
            met = [index for index in now if removal[index] >= target - 1e-9]
            if met:
                chosen[key], waiting[key] = min(met, key=lambda index: moved[index]), []
    rows = []
    for key, members in groups.items():
        known = [index for index in members if index in removal]
        best = chosen.get(key, max(known, key=lambda index: (removal[index], -moved[index])))
        rows.append(
            {
                "variant": key[0],
                "method": key[1],
                "candidate": best,
                "removal": removal[best],
                "shift": moved[best],
                "is_met": key in chosen,
            }
        )
        fit.say(f"  finder: {candidates[best]}: removes {removal[best]:.3f} of {target:.3f}, shift {moved[best]:.4f}")
    return {
        "target": target,
        "unsteered": unsteered,
        "prompts": len(texts),
        "screened": len(few),
        "conversations": conversations,
        "measured": len(removal),
        "chosen": rows,
        "candidates": [
            {
                **one.to_json(),
                "shift": moved.get(index, rough.get(index)),
                "screened_removal": screened[index],
                "removal": removal.get(index),
            }
            for index, one in enumerate(candidates)
        ],
    }


def _promising(members: Sequence[int], screened: Sequence[float], target: float) -> list[int]:
    """Configurations worth measuring; where none looks good, those that remove most."""
    kept = [index for index in members if screened[index] >= NEAR * target]
    return kept or sorted(members, key=lambda index: -screened[index])[:4]


def _refused(fit: TopicFit, measured: Measured) -> list[str]:
    rows = [
        row
        for row in measured.rows([Role.REFUSED], [Use.CALIBRATE])
        if float(measured.confidence[row]) > fit.settings.band
    ]
    if len(rows) < fit.settings.least:
        raise TooFewPrompts(
            f"removal is measured on refused calibration prompts, of which there are {len(rows)}, at least "
            f"{fit.settings.least} are needed: the model answers nearly all that --refused gives; give more prompts"
        )
    return [measured.items[row].text for row in thinned(rows, fit.settings.finder_prompts)]


def _removals(
    fit: TopicFit, engine: Engine, texts: Sequence[str], orders: Sequence[EditOrder], unsteered: float
) -> list[float]:
    told = _confidences(fit, engine, [(text, order) for order in orders for text in texts])
    size = len(texts)
    return [unsteered - sum(told[start : start + size]) / size for start in range(0, len(told), size)]


def _confidences(fit: TopicFit, engine: Engine, orders: Sequence[tuple[str, EditOrder | None]]) -> list[float]:
    """C of each (prompt, edit): of one greedy answer, or of several sampled ones as in stage `judged`."""
    settings = fit.settings
    if settings.finder_samples == 1:
        return [float(label(verdict)) for verdict in verdicts(fit, "removal", engine, orders)]
    texts = list(dict.fromkeys(text for text, _ in orders))
    ids = dict(zip(texts, fit.prompt_ids(engine, texts), strict=True))
    end = end_of_reasoning(engine)
    found = []
    for chosen in _batches(orders):
        asks = [
            Ask(
                prompt=ids[text],
                samples=settings.finder_samples,
                temperature=settings.temperature,
                seed=settings.seed,
                max_tokens=answer_tokens(fit),
                edit=order,
            )
            for text, order in chosen
        ]
        answers = fit.ask("removal", engine, asks)
        told = iter(
            fit.judged(
                [case for (text, _), answer in zip(chosen, answers, strict=True) for case in cases_of(text, answer)]
            )
        )
        for answer in answers:
            labels = [label(next(told).verdict) for _ in answer.samples]
            means = [segment_logprob(one.logprobs, one.tokens, end, thinks=False) for one in answer.samples]
            known = [(z, mean) for z, mean in zip(labels, means, strict=True) if mean is not None]
            found.append(
                score([z for z, _ in known], [mean for _, mean in known], settings.tau).confidence if known else 0.0
            )
    return found


def _batches(asks: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (asks[start : start + MOST_ASKS] for start in range(0, len(asks), MOST_ASKS))
