"""Certified ranges: where they end, and the answers they rest on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.fit import prompts
from steering.fit.ability import ANSWER_TOKENS, answer_loss
from steering.fit.activations import LoadedModel
from steering.fit.categories import CATEGORIES
from steering.fit.certified import Budgets, Grounds, certified_range, in_words, scaled
from steering.fit.control import Fit
from steering.fit.openings import token_openings
from steering.fit.trials import trials_of
from steering.terms import Edit, added_direction
from tests.unit.fit.made_up import SMALL, small_fit


@pytest.mark.parametrize(
    ("budgets", "maximum"),
    [
        (Budgets(spoiled=1.0, loss=1e9, divergence=1e9), 2.0),
        (Budgets(spoiled=1.0, loss=0.4, divergence=1e9), 0.5),
        (Budgets(spoiled=1.0, loss=1e9, divergence=1e-3), 0.0),
        (Budgets(spoiled=-1.0, loss=1e9, divergence=None), 0.0),
    ],
    ids=["none binds", "loss", "divergence", "answers"],
)
def test_a_certified_range_ends_where_the_first_budget_does(
    tiny: LoadedModel, fit: Fit, budgets: Budgets, maximum: float
) -> None:
    """Loss and divergence are measured at every strength tried, as answers are, whose number is told in words."""
    generator = torch.Generator().manual_seed(3)
    edit = Edit(
        name="e",
        layers=(added_direction(layer=1, direction=torch.randn(16, generator=generator), coefficient=2.0),),
    )
    asked = [tiny.prompt("how do i tie a knot"), tiny.prompt("what is tea made of")]
    answered = [(prompt, list(range(30, 30 + ANSWER_TOKENS))) for prompt in asked]
    unsteered = answer_loss(tiny, answered)
    tried = {strength: answer_loss(tiny, answered, scaled(edit, strength)) - unsteered for strength in (0.5, 1.0, 2.0)}
    if budgets.loss == 0.4:
        budgets = budgets._replace(loss=(tried[0.5] + tried[1.0]) / 2)
        assert tried[0.5] < budgets.loss < tried[1.0] < tried[2.0]
    fit = small_fit(tiny, fit.work, replace(SMALL, strengths=(0.5, 1.0, 2.0)))
    grounds = Grounds(asked=asked, plain=asked, answered=answered, loss=unsteered)
    found = certified_range(fit, token_openings(tiny), edit, grounds, budgets)
    assert found["maximum"] == maximum
    for strength, facts in found["tried"].items():
        assert facts["loss_added"] == pytest.approx(tried[float(strength)], abs=1e-3)
        assert facts["n"] == 2
        assert (facts.get("divergence", 0.0) > 0.0) == (budgets.divergence is not None)
    assert "of 2 greedy answers" in in_words(budgets, found["tried"])


def test_prompts_that_guard_a_refuse_dose_are_filled_up_from_other_categories(fit: Fit) -> None:
    """Its own first; a category of few prompts is certified on as many answers as the others."""
    calibrating = prompts.calibration_prompts(fit)
    trials = trials_of(replace(fit, settings=replace(SMALL, ranged=9)), token_openings(fit.loaded), calibrating)
    own = [prompt.ids for prompt in calibrating.items if prompt.category == CATEGORIES[0]]
    assert 0 < len(own) < 9
    for guarded in trials.guarded.values():
        assert len(guarded) == 9
    assert all(ids in trials.guarded[CATEGORIES[0]][: len(own)] for ids in own)
