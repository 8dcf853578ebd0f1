"""P2's four directions against numpy, and the facts that follow from its equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.errors import ActivationsNotFinite, FitError, TooFewPrompts
from steering.fit.ridge import Ridge, RidgeKind
from steering.fit.topic_classes import Classes, classes_of
from steering.fit.topic_directions import (
    Method,
    Offset,
    neutral_offset,
    null_space_warning,
    require_finite,
    topic_directions,
)

WIDTH = 16


def sample(count: int = 90, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Classes]:
    """Residuals around a common mean whose first coordinates follow the confidence, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
    residuals = torch.randn(count, width, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2.0, width)
    residuals[:, :3] += 2 * confidence.unsqueeze(1)
    return (residuals + 4.0).to(torch.float32), classes_of(confidence)


def unit(vector: np.ndarray) -> np.ndarray:
    """At length 1."""
    return vector / np.linalg.norm(vector)


def in_numpy(residuals: Tensor, classes: Classes, strength: float, *, literal: bool = False) -> dict[str, np.ndarray]:
    """Eqs. 1 to 5 and Cyberey & Evans, written out."""
    rows, weight = residuals.numpy().astype(np.float64), np.abs(classes.confidence.numpy())
    p, n, o = classes.refused.numpy(), classes.answered.numpy(), rows[classes.neutral.numpy()].mean(axis=0)
    mean_p, mean_n = rows[p].mean(axis=0), rows[n].mean(axis=0)
    # Weighted means of h - o, as printed.
    shifted_p = (weight[p, None] * (rows[p] - o)).sum(axis=0) / weight[p].sum()
    shifted_n = (weight[n, None] * (rows[n] - o)).sum(axis=0) / weight[n].sum()
    plain = np.cov(rows[n].T, bias=True)
    centred = rows[n] - (shifted_n if literal else shifted_n + o)
    weighted = (weight[n, None] * centred).T @ centred / weight[n].sum()
    identity = strength * np.eye(rows.shape[1])
    return {
        "md": unit(mean_p - mean_n),
        "wmd": unit(unit(shifted_p) - unit(shifted_n)),
        "rmd": unit(np.linalg.solve(plain + identity, mean_p - mean_n)),
        "wrmd": unit(np.linalg.solve(weighted + identity, shifted_p - shifted_n)),
    }


@pytest.mark.parametrize("is_literal", [False, True])
@pytest.mark.parametrize("count", [36, 400])
def test_every_method_gives_what_its_equation_gives(count: int, is_literal: bool) -> None:
    """Against numpy with whole matrices, with more and with fewer answered prompts than coordinates."""
    residuals, classes = sample(count)
    assert (len(classes.answered) < WIDTH) == (count == 36)
    wanted = in_numpy(residuals, classes, 0.5, literal=is_literal)
    found = topic_directions(residuals, classes, ridge=Ridge(value=0.5), is_literal=is_literal)
    assert set(found) == set(Method)
    for method, direction in found.items():
        np.testing.assert_allclose(direction.vector.numpy(), wanted[method], rtol=0, atol=1e-9, err_msg=method)
        assert direction.vector.dtype is torch.float64


def test_the_offset_cancels_from_all_but_wmd() -> None:
    """P2.2's first fact: moving the neutral point changes WMD alone, which normalises before it subtracts."""
    residuals, classes = sample()
    moved = Offset(vector=neutral_offset(residuals, classes).vector + 3.0, prompts=1)
    here, there = topic_directions(residuals, classes), topic_directions(residuals, classes, offset=moved)
    for method in (Method.MD, Method.RMD, Method.WRMD):
        torch.testing.assert_close(here[method].vector, there[method].vector)
    assert float(here[Method.WMD].vector @ there[Method.WMD].vector) < 0.999


def test_the_literal_covariance_is_the_centred_one_plus_the_offset_squared() -> None:
    """P2.2's second fact: eq. 4 as printed equals Cov + o·oᵀ, so that v is all but orthogonal to the neutral mean."""
    residuals, classes = sample(400)
    offset = neutral_offset(residuals, classes).vector
    rows = residuals[classes.answered].to(torch.float64)
    weights = classes.weights[classes.answered]
    mean = (rows * weights.unsqueeze(1)).sum(dim=0) / weights.sum()
    as_printed = rows - (mean - offset)
    printed = (as_printed * weights.unsqueeze(1)).T @ as_printed / weights.sum()
    centred = ((rows - mean) * weights.unsqueeze(1)).T @ (rows - mean) / weights.sum()
    torch.testing.assert_close(printed, centred + torch.outer(offset, offset))
    literal = topic_directions(residuals, classes, is_literal=True)[Method.WRMD].vector
    usual = topic_directions(residuals, classes)[Method.WRMD].vector
    along = offset / offset.norm()
    assert abs(float(literal @ along)) < 0.02 < abs(float(usual @ along))


def test_weights_let_undecided_prompts_count_for_less() -> None:
    """A prompt just outside the band hardly moves a weighted mean, and moves a plain one as much as any other."""
    residuals, classes = sample(60)
    lone = int(classes.refused[0])
    confidence = classes.confidence.clone()
    confidence[lone] = 0.1501
    faint = classes_of(confidence)
    moved = residuals.clone()
    moved[lone] += 50.0
    plain, weighted = Method.MD, Method.WRMD
    before, after = topic_directions(residuals, faint), topic_directions(moved, faint)

    def turned(method: Method) -> float:
        return 1 - float(before[method].vector @ after[method].vector)

    assert turned(weighted) < 0.2 * turned(plain)


def test_too_few_answered_prompts_are_told_with_what_it_means() -> None:
    """P2.2's third fact as a warning: RMD lies in the null space, and relative lambda or shrinkage is better."""
    residuals, classes = sample(60, width=100)
    found = topic_directions(residuals * 10, classes, ridge=Ridge(value=1e-2))
    share = found[Method.RMD].null_share
    assert share is not None
    assert share > 0.99
    told = null_space_warning(len(classes.answered), 100, [share, None])
    assert told is not None
    assert "null space" in told
    assert "--ridge relative" in told
    assert null_space_warning(100, 100, []) is None
    shrunk = topic_directions(residuals * 10, classes, ridge=Ridge(kind=RidgeKind.LEDOIT_WOLF))[Method.RMD]
    assert shrunk.shrinkage is not None
    assert shrunk.null_share is not None
    assert shrunk.null_share < share


def test_neutral_prompts_come_from_the_band_and_from_those_given() -> None:
    """Both count alike; without any the neutral point lies midway between the classes, and the count says so."""
    residuals, classes = sample(400)
    given = torch.full((2, WIDTH), 9.0)
    both = neutral_offset(residuals, classes, given)
    rows = torch.cat([residuals[classes.neutral], given]).to(torch.float64)
    assert both.prompts == len(classes.neutral) + 2
    torch.testing.assert_close(both.vector, rows.mean(dim=0))
    decided = classes_of(torch.where(classes.confidence > 0, 0.8, -0.4))
    middle = neutral_offset(residuals, decided)
    assert middle.prompts == 0
    ends = [residuals[rows].to(torch.float64).mean(dim=0) for rows in (decided.refused, decided.answered)]
    torch.testing.assert_close(middle.vector, (ends[0] + ends[1]) / 2)


def test_classes_that_do_not_differ_have_no_direction() -> None:
    """Equal means are an error rather than a direction made of rounding."""
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    confidence = torch.tensor([0.9] * 8 + [-0.9] * 8)
    with pytest.raises(FitError, match="same mean residual"):
        topic_directions(torch.cat([rows, rows]), classes_of(confidence))


def test_residuals_that_are_no_numbers_are_named() -> None:
    """The error names the layer and the prompts, and says what to do."""
    residuals = torch.zeros(3, 4)
    residuals[1, 2] = float("inf")
    require_finite(residuals[:1], 7, ["a"])
    with pytest.raises(ActivationsNotFinite, match=r"layer 7: residuals of 1 of 3 prompts .*'b'.*bfloat16"):
        require_finite(residuals, 7, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("confidence", "advice"),
    [
        ([], "--refused and --answered"),
        ([0.9] * 20, "--answered"),
        ([-0.9] * 20, "--refused"),
        ([0.1, -0.1] * 20, "undecided on every prompt"),
        ([0.9, -0.9] * 7, "at least 8 are needed of refused and answered"),
        ([0.9, float("nan")] * 20, "numbers from -1 to 1"),
        ([0.9, -1.5] * 20, "numbers from -1 to 1"),
    ],
)
def test_classes_that_nothing_can_be_made_of_say_what_to_do(confidence: list[float], advice: str) -> None:
    """Empty, one-sided, undecided, small and impossible sets each have their own advice."""
    with pytest.raises(TooFewPrompts, match=advice):
        classes_of(torch.tensor(confidence, dtype=torch.float64))


def test_the_band_decides_who_is_neutral() -> None:
    """Its edge is neutral; a band of 0 leaves only prompts of confidence 0."""
    confidence = torch.tensor([0.15, 0.16, -0.15, -0.16, 0.0], dtype=torch.float64)
    assert classes_of(confidence, least=1).counts() == {"refused": 1, "answered": 1, "neutral": 3}
    assert classes_of(confidence, band=0.0, least=1).counts() == {"refused": 2, "answered": 2, "neutral": 1}
