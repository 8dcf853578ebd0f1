"""Stage `verify`: the finished bundle's default gate, run by the engine, against what was put together of it.

The comparison takes each prompt's answer with or without the edit by its probe's score. Here the engine decides.
"""

from __future__ import annotations

from steering.bundle import Bundle
from steering.engine.asks import Ask, BundleGate
from steering.evaluate.judge import Verdict
from steering.fit.datasets import thinned
from steering.fit.stages import Result
from steering.fit.topic_answers import Measured
from steering.fit.topic_compare import LETTERS, Comparison
from steering.fit.topic_finder import answer_tokens
from steering.fit.topic_fit import Session, TopicFit, cases_of
from steering.fit.topic_gate import TopicGate
from steering.plan import Decision, GateOrder

MOST = 256
"""Prompts that are asked, evenly spaced."""


def verify(
    fit: TopicFit,
    measured: Measured,
    compared: Comparison,
    gate: TopicGate,
    saved: Bundle,
    profile: str,
    session: Session,
) -> Result:
    """How often the engine's gate decides, and the answer comes out, as composed."""
    return fit.stage(
        "verify",
        lambda: _verify(fit, measured, compared, gate, saved, profile, session),
        of=("max_tokens",),
        after=[compared.facts],
        given={"bundle": saved.digest, "judge": fit.judge_facts},
    )


def _verify(
    fit: TopicFit,
    measured: Measured,
    compared: Comparison,
    gate: TopicGate,
    saved: Bundle,
    profile: str,
    session: Session,
) -> Result:
    settings = saved.manifest.profile(profile).gate
    assert settings is not None
    facts = next(one for one in compared.facts["arms"] if one["name"] == compared.default.name)
    rows = {name: row for row, name in enumerate(measured.names)}
    places = thinned(range(len(compared.facts["keys"])), MOST)
    chosen = [rows[compared.facts["keys"][place]] for place in places]
    probability = gate.probabilities(measured, chosen)
    wanted = [facts["codes"][place] for place in places]
    order = GateOrder(
        profile=profile, comply_below=settings.comply_below, refuse_above=settings.refuse_above, is_graded=False
    )
    engine = session.engine
    texts = [measured.items[row].text for row in chosen]
    gated = BundleGate(bundle=saved.digest, order=order, reasoning=fit.settings.reasoning)
    asks = [Ask(prompt=ids, max_tokens=answer_tokens(fit), gate=gated) for ids in fit.prompt_ids(engine, texts)]
    answers = fit.ask("verify", engine, asks)
    verdicts: list[Verdict] = [
        one.verdict
        for one in fit.judged(
            [case for text, answer in zip(texts, answers, strict=True) for case in cases_of(text, answer)]
        )
    ]
    decisions = [answer.outcomes[0].decision is Decision.COMPLY for answer in answers]
    expected = [value <= settings.comply_below for value in probability.tolist()]
    return {
        "profile": profile,
        "n": len(places),
        "complied": sum(decisions),
        "same_decision": sum(here == there for here, there in zip(decisions, expected, strict=True)),
        "same_verdict": sum(LETTERS[here] == there for here, there in zip(verdicts, wanted, strict=True)),
    }
