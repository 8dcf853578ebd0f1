"""A tiny model with gates and a response probe in its bundle, hard requests for it, and what must come of them.

Residuals for the reference come from transformers; thresholds are set between the scores that prompts have, so that
some are refused, some complied with and some left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from torch import Tensor

from steering.bundle import Bundle, save_bundle
from steering.engine.outcomes import sample_of
from steering.gate import Ruling, rule
from steering.outcome import Scores
from steering.plan import Decision, GateOrder
from steering.response import response_score
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.scenario import Ask, Result
from tests.samples import random_probe, with_gates, with_response
from tests.tiny_models import WIDTH

if TYPE_CHECKING:
    from tests.integration.engine.conftest import Tiny

CATEGORIES = ("one", "two", "three")
SIDES = (
    {"one": "add", "two": "low rank", "three": "several terms"},
    {"one": "reposition", "two": "add", "three": "add"},
)
LATE = ({"one": "reposition", "two": "reposition"}, {"one": "reposition", "three": "reposition"})
RESPONSE_TOKENS = 4


@dataclass(frozen=True)
class Gated:
    """A tiny model whose bundle has two gates: `gate` at layer 1, before that layer's edits, and `late` at layer 2; and
    a response probe, at layer 2 as well.
    """

    tiny: Tiny
    bundle: Bundle
    known: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Scores by gate and prompt: several checks ask for the same, and the oracle takes a forward pass for each."""

    def expected(self, ask: Ask) -> Ask:
        """The request as the oracle scores it: with the edit and strength the reference decides."""
        if ask.gate is None:
            return ask
        order = GateOrder(**ask.gate)
        ruling, edit = self.ruled(ask.prompt, order)
        edit = None if order.is_observed else edit
        return replace(ask, gate=None, edit=edit, strength=ask.strength * ruling.share if edit else 1.0)

    def ruled(self, prompt: Sequence[int], order: GateOrder) -> tuple[Ruling, str | None]:
        """What the reference decides, and the edit of that side and category; None where the profile has none."""
        probe = self.bundle.probes[order.profile]
        ruling = rule(self.logits(prompt, order.profile), order, probe.categories)
        assert ruling is not None
        profile = self.bundle.manifest.profile(order.profile)
        side = {Decision.REFUSE: profile.refuse, Decision.COMPLY: profile.comply, Decision.ABSTAIN: {}}
        return ruling, side[ruling.decision].get(probe.categories[ruling.category])

    def logits(self, prompt: Sequence[int], profile: str = "gate") -> Tensor:
        """Scores [1 + C] of a prompt, by the reference."""
        key = (profile, tuple(prompt))
        if key not in self.known:
            probe = self.bundle.probes[profile]
            self.known[key] = probe.logits(self.tiny.oracle.residual(prompt, probe.layer))
        return self.known[key]

    def score(self, prompt: Sequence[int], profile: str = "gate") -> float:
        """The refusal probability of a prompt, by the reference."""
        return float(self.logits(prompt, profile)[0].sigmoid())


def make_gated(model: Tiny, folder: Path) -> Gated:
    """The model with gates in its bundle, which is written into `folder`."""
    probes = {
        name: random_probe(name, layer=layer, categories=CATEGORIES, width=WIDTH, seed=layer, scale=1.5)
        for name, layer in (("gate", 1), ("late", 2))
    }
    gates = {"gate": (probes["gate"], *SIDES), "late": (probes["late"], *LATE)}
    response = random_probe("response", layer=2, categories=(), width=WIDTH, seed=7, scale=1.5)
    manifest = with_gates({**model.bundle.manifest.model_dump(), "name": "tiny-gated"}, gates)
    manifest = with_response(manifest, response, RESPONSE_TOKENS)
    probes["response"] = response
    manifest.pop("tensors_digest")
    for record in manifest["edits"]:
        record["purpose"] = "control"
    bundle = save_bundle(folder, manifest, dict(model.bundle.edits), probes)
    return Gated(model, bundle)


def thresholds(gated: Gated, prompts: Sequence[Sequence[int]], profile: str = "gate") -> tuple[float, float]:
    """Thresholds that split these prompts in three, half way between the scores of neighbours."""
    scores = sorted(gated.score(prompt, profile) for prompt in prompts)
    third = len(scores) // 3
    return (scores[third - 1] + scores[third]) / 2, (scores[-third - 1] + scores[-third]) / 2


def gated_crowd(gated: Gated, count: int) -> list[Ask]:
    """Every hard case: chunks, one token, n = 2, preemption, both gates, orders of every kind, other neighbours."""
    lengths = (100, 5, 70, 1, 61, 33, 50, 64, 90, 12)
    prompts = [prompt_of(length, 70 + number) for number, length in enumerate(lengths)]
    low, high = thresholds(gated, prompts)
    asks = [
        Ask(prompt=prompt, count=count, gate={"profile": "gate", "comply_below": low, "refuse_above": high})
        for prompt in prompts
    ]
    late = thresholds(gated, prompts[:6], "late")
    asks += [
        Ask(prompt=prompt, count=count, gate={"profile": "late", "comply_below": late[0], "refuse_above": late[1]})
        for prompt in prompts[:6]
    ]
    order: dict[str, Any] = {"profile": "gate", "comply_below": 0.5, "refuse_above": 0.5}
    asks += [
        Ask(prompt=prompts[1], count=count, gate=order, samples=2),
        Ask(prompt=prompts[2], count=count, gate={**order, "is_graded": True}, strength=2.0),
        Ask(prompt=prompts[4], count=count, gate={**order, "is_observed": True}),
        Ask(prompt=prompts[5], count=count, gate={**order, "categories": ("three",)}),
        Ask(prompt=prompts[6], count=count, edit="add everywhere", scope="all"),
        Ask(prompt=prompts[7], count=count),
        # Observed only, and twice; edits of either scope, observed as well.
        Ask(prompt=prompts[8], count=count, response=True),
        Ask(prompt=prompts[1], count=count, response=True, samples=2),
        Ask(prompt=prompts[2], count=count, edit="several terms", response=True),
        Ask(prompt=prompts[4], count=3, edit="add everywhere", scope="all", response=True),
        Ask(prompt=prompts[9], count=1, response=True),
    ]
    return [replace(ask, response=True) if ask.gate and number % 3 == 0 else ask for number, ask in enumerate(asks)]


def check_responses(gated: Gated, asks: Sequence[Ask], result: Result, round_number: int) -> None:
    """The last that was told of each sample is the reference's score of the tokens that were fed back."""
    probe = gated.bundle.probes["response"]
    told: dict[str, dict[str, tuple[int, float]]] = {}
    for plan, request, tokens, score in result.responses:
        told.setdefault(plan, {})[request] = (tokens, score)
    for number, ask in enumerate(asks):
        found = told.get(f"{round_number}-{number}", {})
        expected, answers = gated.expected(ask), result.rounds[round_number][number].tokens
        assert len(found) == (ask.samples if ask.response and ask.count > 1 else 0)
        for request, (tokens, score) in found.items():
            answer = answers[sample_of(request)]
            assert tokens == min(RESPONSE_TOKENS, ask.count - 1)
            residuals = gated.tiny.oracle.residuals(
                ask.prompt,
                [*ask.prompt, *answer[:tokens]],
                probe.layer,
                edit=expected.edit,
                strength=expected.strength,
                scope=expected.scope,
            )
            assert score == pytest.approx(response_score(probe, residuals[1:], RESPONSE_TOKENS), abs=1e-3)


def check_outcomes(gated: Gated, asks: Sequence[Ask], outcomes: Sequence[dict[str, Any]], round_number: int) -> None:
    """Each gated sample is reported with the decision, category, edit, strength and scores of the reference."""
    for number, ask in enumerate(asks):
        found = [outcome for outcome in outcomes if outcome["plan_id"] == f"{round_number}-{number}"]
        if ask.gate is None:
            continue
        assert len({outcome["request_id"] for outcome in found}) == ask.samples
        expected, order = gated.expected(ask), GateOrder(**ask.gate)
        for outcome in found:
            assert outcome["error"] == ""
            assert (outcome["edit"], outcome["applied"]) == (expected.edit, expected.edit is not None)
            assert outcome["strength"] == pytest.approx(expected.strength if expected.edit else 0.0, abs=1e-4)
            ruling, edit = gated.ruled(ask.prompt, order)
            # A side without an edit for the category leaves the request alone, and says so.
            assert outcome["decision"] == (ruling.decision if edit is not None else Decision.ABSTAIN)
            assert outcome["category"] == CATEGORIES[ruling.category]
            logits = gated.logits(ask.prompt, order.profile)
            scores = msgspec.convert(outcome["scores"], Scores)
            assert scores.refusal == pytest.approx(float(logits[0].sigmoid()), abs=1e-4)
            shares = dict(zip(CATEGORIES, logits[1:].softmax(dim=0).tolist(), strict=True))
            assert scores.categories == pytest.approx(shares, abs=1e-4)


FEW_BLOCKS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 9,
    "block_size": 32,
    "max_model_len": 128,
    "enable_prefix_caching": True,
}
"""Engine options under which some of `few_gated` are preempted."""


def few_gated(gated: Gated) -> list[Ask]:
    """Some of the crowd with short answers, for an engine that is slow or compiles."""
    return [replace(ask, count=min(ask.count, 6)) for ask in gated_crowd(gated, 6) if len(ask.prompt) <= 70][3:]


def longer_than_fit(count: int, order: dict[str, Any]) -> list[Ask]:
    """Gated requests that have all decided when there is no block for the next token of one of them, in an engine that
    holds 2 blocks of 32 tokens for each of `count` and fewer than 3.
    """
    return [Ask(prompt=prompt_of(60, 180 + number), count=14, gate=order) for number in range(count)]


def check_gated(gated: Gated, asks: Sequence[Ask], result: Result, round_number: int) -> None:
    """Decisions, outcomes, answers and what the response probe read are those of the reference."""
    check_responses(gated, asks, result, round_number)
    assert result.responses
    answers = result.rounds[round_number]
    check_against_oracle(gated.tiny.oracle, [gated.expected(ask) for ask in asks], answers)
    check_outcomes(gated, asks, result.outcomes, round_number)
