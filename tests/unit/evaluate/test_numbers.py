"""The numbers by themselves: paired intervals, probe scores, CAST's condition."""

from __future__ import annotations

import math

import pytest
import torch

from steering.errors import InvalidSpec
from steering.evaluate.ability import similarity
from steering.evaluate.arms import arm_from_option, pair_from_option
from steering.evaluate.cast import best_threshold, condition_direction
from steering.evaluate.cast import similarity as condition_similarity
from steering.evaluate.paired import Paired
from steering.evaluate.scores import calibration, histogram, roc


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292), ((0, 29, 1, 0), 0.6666, 0.9882)],
)
def test_paired_intervals_are_newcombes(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    """Method 10 on three of the tables in Newcombe (1998), to four places."""
    found = Paired(both=counts[0], only_first=counts[1], only_second=counts[2], neither=counts[3])
    assert [round(end, 4) for end in found.interval] == [low, high]


def test_mcnemar_is_the_two_sided_binomial() -> None:
    """Against sums of binomial coefficients; no prompt that differs gives 1, thousands do not overflow."""
    found = Paired(both=5, only_first=12, only_second=2, neither=9)
    assert found.p_value == pytest.approx(2 * sum(math.comb(14, k) for k in range(3)) / 2**14)
    assert Paired(both=5, only_first=0, only_second=0, neither=1).p_value == 1.0
    assert Paired(both=0, only_first=4000, only_second=1000, neither=0).p_value < 1e-300


def test_roc_area_counts_ties_as_half() -> None:
    """Separated scores give 1, equal ones a half, and points end at (1, 1)."""
    assert roc([0.8, 0.9], [0.1, 0.2])["auc"] == 1.0
    assert roc([0.5, 0.5], [0.5, 0.5])["auc"] == 0.5
    assert roc([0.3, 0.9], [0.3, 0.1])["auc"] == 0.875
    assert roc([0.3, 0.9], [0.3, 0.1])["points"][-1][1:] == [1.0, 1.0]
    assert roc([], [0.3])["auc"] is None


def test_calibration_of_a_perfect_and_a_useless_probe() -> None:
    """Certain and right costs nothing; a constant half on balanced prompts has a Brier score of a quarter, no error."""
    right = calibration([1.0, 1.0], [0.0, 0.0])
    assert (right["brier"], right["ece"]) == (0.0, 0.0)
    useless = calibration([0.5] * 3, [0.5] * 3)
    assert (useless["brier"], useless["ece"]) == (0.25, 0.0)
    assert histogram([0.0, 0.04, 1.0]) == [2, *[0] * 18, 1]


def test_cast_finds_the_axis_and_the_cut_of_two_clouds() -> None:
    """The component points from harmless to harmful, and the best cut separates what can be separated."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 60, 8, generator=generator) * 0.1
    axis = torch.zeros(8)
    axis[3] = 1.0
    harmful, harmless = noise[0] + axis, noise[1] - axis
    direction = condition_direction(harmful, harmless)
    assert float(direction @ axis) > 0.98
    f1, cut, is_above = best_threshold(harmful @ direction, harmless @ direction)
    assert (f1, is_above) == (1.0, True)
    assert -0.8 < cut < 0.9
    flipped = best_threshold(-(harmful @ direction), -(harmless @ direction))
    assert (flipped[0], flipped[2]) == (1.0, False)
    assert best_threshold(torch.ones(3), torch.ones(1))[0] == pytest.approx(6 / 7), "flagging all is the best there is"


def test_cast_similarity_is_the_papers_formula() -> None:
    """cos(h, tanh(proj_c h)) term by term, with c of unit norm."""
    residual = torch.tensor([[0.5, -2.0, 1.0]])
    direction = torch.tensor([0.6, 0.8, 0.0])
    projected = torch.tanh(torch.outer(direction, direction) @ residual[0])
    wanted = (residual[0] @ projected) / (residual.norm() * projected.norm())
    assert float(condition_similarity(residual, direction)[0]) == pytest.approx(float(wanted), abs=1e-6)


def test_cast_similarity_with_its_sign_tells_sides_that_the_printed_one_folds() -> None:
    """Residuals h and -h are alike as printed; with the sign of h·c the same number is on either side of zero."""
    both = torch.tensor([[0.5, 2.0, 1.0], [-0.5, -2.0, -1.0]])
    direction = torch.tensor([0.6, 0.8, 0.0])
    printed = condition_similarity(both, direction)
    assert float(printed[0]) == pytest.approx(float(printed[1]))
    signed = condition_similarity(both, direction, is_signed=True)
    assert signed.tolist() == pytest.approx([float(printed[0]), -float(printed[0])])


def test_options_that_are_no_arms_or_thresholds_are_refused() -> None:
    """Each message shows the form that is wanted."""
    for text in ("x", "x=[]", "x={", "={}"):
        with pytest.raises(InvalidSpec, match="--arm"):
            arm_from_option(text)
    assert pair_from_option("0.1:0.8") == (0.1, 0.8)
    for text in ("0.5", "0.9:0.1", "a:b", "nan:nan"):
        with pytest.raises(InvalidSpec, match="--sweep"):
            pair_from_option(text)


def test_similarity_is_of_words_in_order() -> None:
    """Equal texts are 1, texts without a common word 0, half of the words a half."""
    assert similarity("a b c", "a b c") == 1.0
    assert similarity("", "") == 1.0
    assert similarity("a b", "c d") == 0.0
    assert similarity("a b c d", "a b x y") == 0.5
