"""Ridge-regularised solves against numpy, whichever way they are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.errors import FitError
from steering.fit.ridge import Ridge, RidgeKind, solve


def drawn(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Centred rows [n, D] that give a covariance, with scales that differ between coordinates, and a target."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows *= torch.linspace(0.2, 3.0, width, dtype=torch.float64)
    rows -= rows.mean(dim=0)
    return rows / count**0.5, torch.randn(width, generator=generator, dtype=torch.float64)


def direct(rows: Tensor, target: Tensor, strength: float, extra: Tensor | None = None) -> np.ndarray:
    """The solution by numpy from the whole matrix."""
    covariance = (rows.T @ rows).numpy()
    if extra is not None:
        covariance = covariance + np.outer(extra.numpy(), extra.numpy())
    return np.linalg.solve(covariance + strength * np.eye(len(target)), target.numpy())


@pytest.mark.parametrize("count", [12, 40, 200])
@pytest.mark.parametrize("has_extra", [False, True])
def test_both_ways_of_solving_give_what_numpy_gives(count: int, has_extra: bool) -> None:
    """Fewer rows than coordinates take the Woodbury identity, more take Cholesky; both equal the direct solution."""
    rows, target = drawn(count, 40)
    extra = 5 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if has_extra else None
    found = solve(rows, target, Ridge(value=1e-2), extra=extra)
    np.testing.assert_allclose(found.vector.numpy(), direct(rows, target, 1e-2, extra), rtol=1e-8)
    assert found.ridge == 1e-2
    assert (found.null_share is None) == (count + has_extra >= 40)


def test_a_relative_ridge_is_in_units_of_the_mean_variance() -> None:
    """Residuals a thousand times as long give the same direction under a relative lambda, not under an absolute one."""
    rows, target = drawn(60, 20)
    relative = Ridge(kind=RidgeKind.RELATIVE, value=0.1)
    small, large = solve(rows, target, relative), solve(1000 * rows, target, relative)
    level = float(rows.square().sum()) / 20
    assert small.ridge == pytest.approx(0.1 * level)
    np.testing.assert_allclose(small.vector.numpy(), direct(rows, target, 0.1 * level), rtol=1e-9)
    torch.testing.assert_close(large.vector * 1e6, small.vector)


def test_ledoit_wolf_is_the_solution_with_the_covariance_that_scikit_learn_shrinks() -> None:
    """The direction is that of the inverse of scikit-learn's shrunk covariance."""
    from sklearn.covariance import LedoitWolf

    rows, target = drawn(30, 12)
    samples = (rows * 30**0.5).numpy()
    model = LedoitWolf(assume_centered=True).fit(samples)
    wanted = np.linalg.solve(model.covariance_, target.numpy())
    found = solve(rows, target, Ridge(kind=RidgeKind.LEDOIT_WOLF))
    assert found.shrinkage == pytest.approx(model.shrinkage_)
    cosine = wanted @ found.vector.numpy() / np.linalg.norm(wanted) / np.linalg.norm(found.vector.numpy())
    assert cosine == pytest.approx(1.0, abs=1e-12)


def test_a_small_absolute_ridge_lives_in_the_null_space_of_too_few_prompts() -> None:
    """P2.2's third fact: with n < D and lambda 1e-2 nearly all of the solution lies where the covariance is zero."""
    rows, target = drawn(30, 120)
    small = solve(10 * rows, target, Ridge(value=1e-2))
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[:29]
    unit = small.vector / small.vector.norm()
    wanted = 1 - float((basis @ unit).square().sum())
    assert small.null_share == pytest.approx(wanted, abs=1e-6)
    assert small.null_share is not None
    assert small.null_share > 0.999
    shrunk = solve(10 * rows, target, Ridge(kind=RidgeKind.LEDOIT_WOLF))
    assert shrunk.null_share is not None
    assert shrunk.null_share < small.null_share


def test_equal_rows_leave_the_target_as_it_is() -> None:
    """A class without variance has no covariance to divide by, whatever the kind of lambda."""
    target = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for kind in RidgeKind:
        found = solve(torch.zeros(9, 2, dtype=torch.float64), target, Ridge(kind=kind)).vector
        torch.testing.assert_close(found / found.norm(), target / target.norm())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lambda_that_is_no_positive_number_is_refused(value: float) -> None:
    """It would leave the matrix singular or worse."""
    with pytest.raises(FitError, match="above 0"):
        Ridge(value=value)


def test_a_lambda_below_rounding_is_named_rather_than_used() -> None:
    """Where float64 cannot hold the sum of covariance and lambda, the answer would be noise."""
    rows = torch.zeros(4, 3, dtype=torch.float64)
    rows[:, 0], rows[:, 1] = 1e6, -1e6
    with pytest.raises(FitError, match="larger --lambda"):
        solve(rows, torch.ones(3, dtype=torch.float64), Ridge(value=1e-9))
