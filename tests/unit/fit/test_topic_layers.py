"""Layers of a topic's edit: scales, ranking, the edits themselves, and what is told of their vectors."""

from __future__ import annotations

import math

import pytest
import torch

from steering.errors import FitError
from steering.fit.topic_analysis import bootstrap, cosines, spread
from steering.fit.topic_classes import classes_of
from steering.fit.topic_directions import Method, topic_directions
from steering.fit.topic_edits import LayerPart, topic_edit
from steering.fit.topic_layers import LayerScore, layer_score, ranked, scales
from steering.terms import apply_terms


def score(layer: int, correlation: float = 0.8, rmse: float = 0.0) -> LayerScore:
    """A layer with scales 2 and 3."""
    return LayerScore(
        layer=layer, correlation=correlation, rmse=rmse, mismatches=0, n=10, refuse_scale=2.0, comply_scale=3.0
    )


def test_scales_are_quotients_of_quantiles_of_either_side() -> None:
    """s^+ is made of refused prompts' 95 % quantiles, s^- of answered ones' 5 % quantiles."""
    confidence = torch.linspace(-1, 1, 201, dtype=torch.float64)
    projections = torch.where(confidence > 0, 4 * confidence, 7 * confidence)
    assert scales(projections, confidence) == pytest.approx((4.0, 7.0))


def test_scales_are_one_where_a_side_says_nothing() -> None:
    """A side without prompts, or whose projections are all zero, has no unit of its own."""
    confidence = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert scales(2 * confidence, confidence) == (2.0, 1.0)
    assert scales(0 * confidence, confidence) == (1.0, 1.0)


def test_alpha_means_the_same_at_layers_of_any_size() -> None:
    """Residuals a hundred times as long have scales a hundred times as long, and the same score."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(80, generator=generator, dtype=torch.float64) * 2 - 1
    projections = confidence + 0.4 * torch.randn(80, generator=generator, dtype=torch.float64)
    small, large = layer_score(0, projections, confidence), layer_score(0, 100 * projections, confidence)
    assert large.refuse_scale == pytest.approx(100 * small.refuse_scale)
    assert large.score == pytest.approx(small.score)
    assert small.mismatches > 0


def test_the_score_is_correlation_minus_the_error_of_wrong_signs() -> None:
    """By hand: one of four prompts projects to the wrong side, half a unit of confidence from zero."""
    confidence = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    projections = torch.tensor([2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    found = layer_score(3, projections, confidence)
    up, down = scales(projections, confidence)
    wanted = torch.corrcoef(torch.stack([projections, confidence]))[0, 1]
    assert found.mismatches == 1
    assert found.correlation == pytest.approx(float(wanted))
    assert found.rmse == pytest.approx(1.0 / up + 1.0)
    assert found.score == pytest.approx(float(wanted) - 1.0 / up - 1.0)
    assert down > 0


def test_ranking_drops_the_deepest_layers_and_those_without_a_correlation() -> None:
    """Five percent of 48 layers is three, of 6 is one; a constant projection has no place in a ranking."""
    flat = layer_score(1, torch.ones(5), torch.linspace(-1, 1, 5))
    assert math.isnan(flat.score)
    assert LayerScore.from_json(flat.to_json()).to_json() == flat.to_json()
    scores = [score(0, 0.2), flat, score(2, 0.9, 0.5), score(4, 0.6), score(5, 0.99)]
    assert [one.layer for one in ranked(scores, 6)] == [4, 2, 0]
    assert [one.layer for one in ranked([score(layer) for layer in range(48)], 48)] == list(range(45))


def test_an_additive_edit_moves_every_layer_by_alpha_times_its_scale() -> None:
    """The sign of alpha picks the scale, layers come ascending, and half the strength is half of alpha."""
    vector = torch.tensor([0.6, 0.8])
    parts = [LayerPart(score=score(layer), vector=vector, offset=5.0) for layer in (4, 1)]
    residual = torch.tensor([[1.0, -2.0]])
    for alpha, scale in ((0.5, 2.0), (-0.5, 3.0)):
        edit = topic_edit("edit", parts, alpha)
        assert [terms.layer for terms in edit.layers] == [1, 4]
        for terms in edit.layers:
            torch.testing.assert_close(apply_terms(residual, terms, 1.0), residual + alpha * scale * vector)
            half = topic_edit("half", parts, alpha / 2).layers[0]
            torch.testing.assert_close(apply_terms(residual, terms, 0.5), apply_terms(residual, half, 1.0))


def test_repositioning_sets_the_projection_beyond_the_neutral_point() -> None:
    """H' = h - <h - o, v> v + α s v: along v every residual ends at <o, v> + α s, and nothing else changes."""
    vector, across = torch.tensor([0.6, 0.8]), torch.tensor([0.8, -0.6])
    offset = torch.tensor([3.0, 1.0])
    part = LayerPart(score=score(2), vector=vector, offset=float(offset @ vector))
    terms = topic_edit("edit", [part], -0.5, is_reposition=True).layers[0]
    residuals = torch.tensor([[1.0, -2.0], [40.0, 7.0]])
    edited = apply_terms(residuals, terms, 1.0)
    wanted = residuals - ((residuals - offset) @ vector).unsqueeze(1) * vector - 0.5 * 3.0 * vector
    torch.testing.assert_close(edited, wanted)
    torch.testing.assert_close(edited @ across, residuals @ across)


@pytest.mark.parametrize(("parts", "alpha"), [(0, -1.0), (1, 0.0)])
def test_an_edit_without_layers_or_without_a_dose_is_refused(parts: int, alpha: float) -> None:
    """Either would say that it steers and do nothing."""
    given = [LayerPart(score=score(0), vector=torch.tensor([1.0]), offset=0.0)] * parts
    with pytest.raises(FitError, match="at least one layer"):
        topic_edit("edit", given, alpha)


def test_spread_tells_an_even_vector_from_a_peak() -> None:
    """The ten largest of 100 equal coordinates hold a tenth; one coordinate alone holds everything."""
    assert spread(torch.ones(100)) == pytest.approx({"largest": 0.1, "participation": 1.0})
    peak = torch.zeros(100)
    peak[3] = -2.0
    assert spread(peak) == pytest.approx({"largest": 1.0, "participation": 0.01})
    noise = spread(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    assert noise["participation"] == pytest.approx(1 / 3, abs=0.02)
    assert cosines([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([-1.0, 0.0])]) == [
        [1.0, 0.0, -1.0],
        [0.0, 1.0, 0.0],
        [-1.0, 0.0, 1.0],
    ]


def test_a_bootstrap_tells_a_stable_vector_from_one_made_of_few_prompts() -> None:
    """More prompts make resampled vectors more alike; the same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def stability(count: int) -> dict[str, float]:
        confidence = torch.cat([torch.full((count,), 0.9), torch.full((count,), -0.9)]).to(torch.float64)
        residuals = torch.randn(2 * count, 24, generator=generator)
        residuals[:count, 0] += 2.0
        classes = classes_of(confidence)
        found = {method: one.vector for method, one in topic_directions(residuals, classes).items()}
        ridges = {method: 1e-2 if "r" in method else None for method in found}
        told = bootstrap(residuals, classes, found, rounds=12, seed=1, ridges=ridges, is_literal=False)
        again = bootstrap(residuals, classes, found, rounds=12, seed=1, ridges=ridges, is_literal=False)
        assert told == again
        assert all(facts["rounds"] == 12 and facts["n"]["refused"] == count for facts in told.values())
        assert all(facts["lowest"] <= facts["low"] <= facts["mean"] <= 1.0 for facts in told.values())
        return {name: facts["mean"] for name, facts in told.items()}

    few, many = stability(12), stability(400)
    assert set(few) == {method.value for method in Method}
    assert all(many[name] > few[name] for name in few)
    assert many["md"] > 0.97
