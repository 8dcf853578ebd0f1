"""Arms share the prefix of a pass and give what each edit gives alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.fit import arms as arms_module
from steering.fit.activations import LoadedModel, first_logits, greedy
from steering.fit.arms import (
    ANSWERED,
    NEITHER,
    UNSTEERED,
    Arm,
    arm_codes,
    arm_effects,
    neither,
    over_arms,
    refusals,
    token_codes,
)
from steering.fit.categories import CATEGORIES
from steering.fit.openings import Opening, Openings, token_openings
from steering.fit.outcomes import decide
from steering.terms import Edit, added_direction

TEXTS = ["what is tea", "tea", "how do i tie a knot", "a knot is tea"]


def _edit(layer: int, coefficient: float, seed: int = 0) -> Edit:
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Edit(name="e", layers=(added_direction(layer=layer, direction=direction, coefficient=coefficient),))


def test_logits_of_every_arm_are_those_of_a_whole_pass(tiny: LoadedModel) -> None:
    """With the prefix shared; an arm with a strength for each prompt included."""
    prompts = tiny.prompts(TEXTS)
    strengths = torch.tensor([0.0, 1.0, -2.0, 0.5])
    edit = _edit(1, 5.0)
    found = torch.zeros(3, 4, tiny.model.config.vocab_size)

    def take(number: int, indices: list[int], logits: torch.Tensor) -> None:
        found[number, indices] = logits

    with torch.inference_mode():
        over_arms(tiny, prompts, [UNSTEERED, Arm(edit, strengths), Arm(edit, 2.0)], take)
    torch.testing.assert_close(found[0], first_logits(tiny, prompts), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], first_logits(tiny, prompts, edit, 2.0), atol=1e-4, rtol=1e-4)
    for row, strength in enumerate(strengths.tolist()):
        alone = first_logits(tiny, [prompts[row]], edit, strength)[0]
        torch.testing.assert_close(found[1, row], alone, atol=1e-4, rtol=1e-4)


def test_every_prompt_may_have_an_edit_of_its_own(tiny: LoadedModel) -> None:
    """Rows of one batch under different edits, at different layers, and under none: each as it is alone."""
    prompts = tiny.prompts(["what is tea", "what is tie", "what is tea"])
    each = [_edit(1, 5.0), None, _edit(0, 9.0, 3)]
    strengths = torch.tensor([1.0, 1.0, -0.5])
    found = torch.zeros(3, tiny.model.config.vocab_size)

    def take(number: int, indices: list[int], logits: torch.Tensor) -> None:
        if number:
            found[indices] = logits

    with torch.inference_mode():
        over_arms(tiny, prompts, [UNSTEERED, Arm(each, strengths)], take)
    for row, edit in enumerate(each):
        alone = first_logits(tiny, [prompts[row]], edit, float(strengths[row]))[0]
        torch.testing.assert_close(found[row], alone, atol=1e-4, rtol=1e-4)
    answers = greedy(tiny, prompts, each, strengths, new_tokens=4)
    assert answers == [
        greedy(tiny, [prompts[row]], edit, float(strengths[row]), new_tokens=4)[0] for row, edit in enumerate(each)
    ]


def test_a_model_whose_state_cannot_be_cut_back_is_run_in_full(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hybrid models keep a running state: the same numbers, one whole pass for each arm."""
    prompts, arms = tiny.prompts(TEXTS), [UNSTEERED, Arm(_edit(1, 8.0)), Arm(_edit(2, 50.0, 3))]
    shared = arm_codes(tiny, token_openings(tiny), CATEGORIES, prompts, arms)
    monkeypatch.setattr(arms_module, "prefix", lambda *_arguments: None)
    whole = arm_codes(tiny, token_openings(tiny), CATEGORIES, prompts, arms)
    for one, other in zip(shared, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_codes_say_what_decide_says(tiny: LoadedModel) -> None:
    """An edit that makes every prompt political, and the model alone."""
    prompts = tiny.prompts(TEXTS)
    weight = tiny.model.get_output_embeddings().weight[tiny.categories["Political"]].detach()
    push = Edit(
        name="push",
        layers=(added_direction(layer=2, direction=torch.nn.functional.normalize(weight, dim=0), coefficient=1e4),),
    )
    alone, pushed = arm_codes(tiny, token_openings(tiny), CATEGORIES, prompts, [UNSTEERED, Arm(push)])
    assert pushed.tolist() == [CATEGORIES.index("Political")] * 4
    outcomes = decide(tiny, prompts)
    assert [code >= 0 for code in alone] == [category is not None for category in outcomes.refused]
    assert [code == ANSWERED for code in alone] == list(outcomes.answered)
    assert (refusals(pushed).count, neither(pushed).count) == (4, 0)


def test_first_tokens_that_are_known_are_read_alike(tiny: LoadedModel) -> None:
    """A refusal token, `[respond]`, and any other token."""
    assert tiny.respond is not None
    tokens = torch.tensor([tiny.categories["Political"], tiny.respond, 40])
    found = token_codes(token_openings(tiny), CATEGORIES, tokens)
    assert found.tolist() == [CATEGORIES.index("Political"), ANSWERED, NEITHER]


def test_a_model_without_tokens_is_read_by_its_openings(tiny: LoadedModel) -> None:
    """A refusal has no category; an answer that does not begin with an opening is answered."""
    prompts = tiny.prompts(TEXTS)
    plain = replace(tiny, categories={}, respond=None)
    weight = tiny.model.get_output_embeddings().weight[77].detach()
    push = Edit(
        name="push",
        layers=(added_direction(layer=2, direction=torch.nn.functional.normalize(weight, dim=0), coefficient=1e4),),
    )
    openings = Openings(refusals=(Opening(tokens=(77, 77), text=""),), respond=None, found="")
    alone, pushed = arm_codes(plain, openings, CATEGORIES, prompts, [UNSTEERED, Arm(push)])
    assert alone.tolist() == [ANSWERED] * 4
    assert pushed.tolist() == [len(CATEGORIES)] * 4


def test_divergence_is_nought_for_no_edit_and_grows_with_the_dose(tiny: LoadedModel) -> None:
    """The mean KL of the first token, in nats; against torch by hand for one dose."""
    prompts = tiny.prompts(TEXTS)
    edit = _edit(1, 2.0)
    arms = [Arm(edit, 0.0), Arm(edit, 1.0), Arm(edit, 3.0)]
    effects = arm_effects(tiny, token_openings(tiny), CATEGORIES, prompts, arms)
    none, small, large = effects.divergences
    for found, expected in zip(
        effects.codes, arm_codes(tiny, token_openings(tiny), CATEGORIES, prompts, arms), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert none == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < small < large
    base, steered = (torch.log_softmax(first_logits(tiny, prompts, *arm), dim=-1) for arm in ((), (edit, 1.0)))
    assert small == pytest.approx(float((base.exp() * (base - steered)).sum() / 4), rel=1e-3)
