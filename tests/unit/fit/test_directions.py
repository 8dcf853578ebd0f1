"""P1's Algorithm 1 on numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from steering.errors import OperatorError
from steering.fit.directions import ClassMean, difference, largest, random_direction, thresholded, unit
from steering.fit.intervals import Rate


def test_class_means_do_not_depend_on_batching_and_are_summed_in_float64() -> None:
    """A hundred thousand float32 ones around a large offset average exactly."""
    residuals = torch.full((100_000, 2), 16_777_217.0, dtype=torch.float64).to(torch.float32)
    whole, parts = ClassMean(), ClassMean()
    whole.add(residuals)
    for piece in residuals.split(777):
        parts.add(piece)
    assert torch.equal(whole.mean, parts.mean)
    assert whole.mean.dtype is torch.float64
    assert whole.mean[0].item() == residuals[0, 0].item()


def test_an_empty_class_is_an_error() -> None:
    """No prompts give no direction, rather than one made of nan."""
    with pytest.raises(OperatorError, match="no prompts"):
        _ = ClassMean().mean


def test_the_threshold_is_applied_to_each_mean_before_the_difference() -> None:
    """P1.2 step 3: a small coordinate of one mean counts as zero even where the other mean is large."""
    refused = torch.tensor([0.0009, -0.5, 0.001], dtype=torch.float64)
    answered = torch.tensor([-0.2, 0.0009, 0.0], dtype=torch.float64)
    assert thresholded(refused).tolist() == [0.0, -0.5, 0.001]
    assert difference(refused, answered).tolist() == [0.2, -0.5, 0.001]


def test_only_the_largest_coordinates_are_kept() -> None:
    """P1.2 step 4: by absolute value, the rest is exactly zero; K beyond the width keeps all."""
    vector = torch.tensor([0.1, -3.0, 2.0, -0.2])
    assert largest(vector, 2).tolist() == pytest.approx([0.0, -3.0, 2.0, 0.0])
    assert torch.equal(largest(vector, 200), vector)


def test_directions_have_length_one_and_a_zero_difference_is_an_error() -> None:
    """Doses live in coefficients, so a direction's length says nothing."""
    assert torch.linalg.vector_norm(unit(torch.tensor([3.0, 4.0]))).item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(OperatorError, match="do not differ"):
        unit(torch.zeros(3))
    with pytest.raises(OperatorError, match="do not differ"):
        unit(torch.tensor([1.0, float("nan")]))


def test_random_directions_are_seeded() -> None:
    """The control can be made again, and another seed gives another one."""
    assert torch.equal(random_direction(8, 1), random_direction(8, 1))
    assert not torch.equal(random_direction(8, 1), random_direction(8, 2))


def test_wilson_intervals_match_known_values_and_stay_inside_zero_and_one() -> None:
    """Against published values: 15 of 20 gives 0.531 to 0.888; 0 of 10 gives 0 to 0.278."""
    assert Rate(count=15, n=20).interval == pytest.approx((0.5313, 0.8881), abs=2e-4)
    assert Rate(count=0, n=10).interval == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert Rate(count=0, n=0).interval == (0.0, 1.0)
