"""Questions of an offline engine: from an ask to vLLM's parameters, and from vLLM's output to an answer."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steering.bundle import Bundle
from steering.engine.asks import Answer, Ask, BundleGate, EditOrder, Sample
from steering.engine.capture import CAPTURE_KEY
from steering.engine.outcomes import sample_of
from steering.errors import EditNotApplied, InvalidSpec, TrimtabError
from steering.outcome import Outcome, Rejection, Report, Response
from steering.plan import PLAN_KEY, Plan

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An ask on its way.

    Attributes:
        plan: what is to be done; None for nothing.
        index: under which its residuals are kept; None where they are not.
        is_silent: nothing but its residuals is wanted.
    """

    ask: Ask
    plan: Plan | None
    index: int | None
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class Reports:
    """What the engine did, and what its response probe read, by plan and sample; or, by plan, why it ran none."""

    outcomes: defaultdict[str, dict[int, Outcome]] = field(default_factory=lambda: defaultdict(dict))
    responses: defaultdict[str, dict[int, Response]] = field(default_factory=lambda: defaultdict(dict))
    rejections: dict[str, TrimtabError] = field(default_factory=dict)

    def receive(self, report: Report) -> None:
        """Keep a report; see `outcomes.listen`."""
        if isinstance(report, Outcome):
            self.outcomes[report.plan_id][sample_of(report.request_id)] = report
        elif isinstance(report, Rejection):
            self.rejections[report.plan_id] = TrimtabError.from_fields(report.error)
        else:
            self.responses[report.plan_id][sample_of(report.request_id)] = report


def plan_of_ask(ask: Ask, bundles: Sequence[Bundle]) -> Plan | None:
    """What the engine is to do for an ask."""
    given: dict[str, Any] = {} if ask.answer is None else {"prompt_length": len(ask.prompt)}
    if ask.gate is not None:
        order: EditOrder | BundleGate = ask.gate
        what: dict[str, Any] = {"gate": ask.gate.order}
    elif ask.edit is not None and ask.edit.strength != 0:
        order, what = ask.edit, {"edit": ask.edit.edit, "scope": ask.edit.scope}
    else:
        observing = [bundle for bundle in bundles if bundle.manifest.response is not None]
        if not observing:
            return None
        digest = observing[0].digest
        return Plan(id=secrets.token_hex(16), bundle=digest, strength=1.0, response=True, **given)
    loaded = {bundle.digest: bundle for bundle in bundles}
    if order.bundle not in loaded:
        raise InvalidSpec(f"no bundle {order.bundle} is loaded; loaded: {sorted(loaded)}")
    response = loaded[order.bundle].manifest.response is not None
    return Plan(
        id=secrets.token_hex(16),
        bundle=order.bundle,
        strength=order.strength,
        response=response,
        reasoning=order.reasoning,
        **what,
        **given,
    )


def parameters_of(question: Question, *, detokenize: bool) -> SamplingParams:
    """VLLM's parameters; texts are made with `detokenize`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ask = question.ask
    extra: dict[str, Any] = {}
    if question.plan is not None:
        extra[PLAN_KEY] = question.plan.to_json()
    if question.index is not None:
        end = [] if ask.answer is None else [len(ask.prompt)]
        extra[CAPTURE_KEY] = [question.index, *end]
    if ask.answer is not None:
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=None if question.is_silent else 0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra or None,
        )
    return SamplingParams(
        n=ask.samples,
        temperature=ask.temperature,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        logprobs=None if question.is_silent else 0,
        detokenize=detokenize and not question.is_silent,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra or None,
    )


def confirmed(number: int, question: Question, reports: Reports) -> tuple[Outcome, ...]:
    """What the engine did for an ask, by sample; nothing for one that was to be left alone.

    Raises:
        EditNotApplied: it was not edited as it should have been.
    """
    plan = question.plan
    if plan is None or not plan.is_steering:
        return ()
    told = reports.outcomes[plan.id]
    lacking = [sample for sample in range(question.ask.samples) if sample not in told]
    if lacking:
        raise EditNotApplied(f"ask {number}: the engine did not confirm the edit of samples {lacking}")
    reported = tuple(told[sample] for sample in range(question.ask.samples))
    for outcome in reported:
        if outcome.error or not (outcome.applied or outcome.decision):
            raise EditNotApplied(f"ask {number}: the engine did not apply edit {plan.edit!r}: {outcome.error}")
    return reported


def answer_of(question: Question, output: RequestOutput, reports: Reports, outcomes: tuple[Outcome, ...]) -> Answer:
    """What came of an ask whose edits are `confirmed`."""
    ask, plan = question.ask, question.plan
    response = None
    if plan is not None and plan.response:
        read = reports.responses[plan.id]
        response = tuple(read[sample].probability if sample in read else None for sample in range(ask.samples))
    if ask.answer is not None:
        assert output.prompt_logprobs is not None
        places = output.prompt_logprobs[len(ask.prompt) : len(ask.tokens)]
        given = [place[token].logprob for place, token in zip(places, ask.answer, strict=True) if place is not None]
        assert len(given) == len(ask.answer)
        return Answer(given=tuple(given), outcomes=outcomes, response=response)
    samples = []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        assert sample.logprobs is not None
        pairs = zip(sample.logprobs, sample.token_ids, strict=True)
        logprobs = [place[token].logprob for place, token in pairs if place is not None]
        samples.append(
            Sample(
                tokens=tuple(sample.token_ids),
                logprobs=tuple(logprobs),
                text=sample.text,
                finish=str(sample.finish_reason),
            )
        )
    return Answer(samples=tuple(samples), outcomes=outcomes, response=response)
