"""The algebra x' = x + strength · Σ ( gain · <x, q> + bias ) · p, against float64 numpy.

Inputs in bfloat16 and float16 are exact in float32 and float64, so what is compared is the arithmetic alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from steering.errors import BundleFormatError
from steering.terms import (
    MAX_RANK,
    Edit,
    LayerTerms,
    ablated_direction,
    added_direction,
    apply_terms,
    delta,
    layers_of,
    low_rank_map,
    repositioned_direction,
)
from tests.samples import random_edit, random_terms, unit_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_float64(residual: Tensor, terms: LayerTerms, strength: Any) -> NDArray[np.float64]:
    """The formula of the design, term by term, in float64."""
    x = residual.to(torch.float64).numpy()
    read, write, gain, bias = (
        getattr(terms, part).to(torch.float64).numpy() for part in ("read", "write", "gain", "bias")
    )
    result = x.copy()
    for q, p, g, b in zip(read, write, gain, bias, strict=True):
        result = result + (np.asarray(strength) * (g * (x * q).sum(-1) + b))[..., None] * p
    return result


def residual_of(tokens: int, width: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    """[tokens, width] normal numbers with one large column, as real residual streams have."""
    drawn = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] *= 50
    return drawn.to(dtype)


def direction_of(width: int = 16) -> Tensor:
    """One unit vector."""
    return unit_rows(1, width, torch.Generator().manual_seed(3))[0]


@pytest.mark.parametrize("strength", [1.0, -0.7, 3.25])
def test_adding_moves_every_row_by_the_same_vector(strength: float) -> None:
    """`added_direction` adds strength · coefficient · direction, whatever the residual holds."""
    x, direction = residual_of(5, 16, torch.float32), direction_of()
    edited = apply_terms(x, added_direction(layer=0, direction=direction, coefficient=4.0), strength)
    expected = x.double() + strength * 4.0 * direction.double()
    torch.testing.assert_close(edited.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_ablation_removes_its_share_along_the_direction_and_nothing_else(strength: float) -> None:
    """What is left along the direction is 1 - strength of it; what is orthogonal to it stays."""
    x, direction = residual_of(5, 16, torch.float32).double(), direction_of().double()
    edited = apply_terms(x.float(), ablated_direction(layer=0, direction=direction), strength).double()
    torch.testing.assert_close(edited @ direction, (1 - strength) * (x @ direction), rtol=1e-5, atol=2e-5)
    across = torch.eye(16, dtype=torch.float64) - torch.outer(direction, direction)
    torch.testing.assert_close(edited @ across, x @ across, rtol=1e-5, atol=2e-5)


def test_repositioning_sets_the_coefficient_whatever_it_was() -> None:
    """At strength 1 every row's coefficient along the direction is the target."""
    x, direction = residual_of(6, 16, torch.float32), direction_of()
    edited = apply_terms(x, repositioned_direction(layer=0, direction=direction, target=-2.5), 1.0)
    torch.testing.assert_close(edited @ direction, torch.full((6,), -2.5), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_map_is_the_map_itself_where_its_rank_suffices(rank: int) -> None:
    """The edit is x' = x + A x for a matrix A of that rank, out of its singular value decomposition."""
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 16, generator=generator)
    x = residual_of(4, 16, torch.float32)
    terms = low_rank_map(layer=2, matrix=matrix, rank=rank)
    assert terms.rank == rank
    torch.testing.assert_close(apply_terms(x, terms, 1.0), x + x @ matrix.T, rtol=1e-4, atol=1e-3)


def test_low_rank_map_keeps_the_largest_singular_values() -> None:
    """The error of a truncated map is that of the best approximation: the first singular value left out."""
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    terms = low_rank_map(layer=0, matrix=matrix, rank=5)
    rebuilt = terms.write.T @ torch.diag(terms.gain) @ terms.read
    singular = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix - rebuilt, ord=2), singular[5], rtol=1e-4, atol=1e-5)


@given(
    rank=st.integers(1, 8),
    width=st.integers(1, 40),
    tokens=st.integers(1, 6),
    strength=st.floats(-4, 4, allow_nan=False),
    seed=st.integers(0, 2**20),
)
def test_several_terms_all_read_the_unedited_residual(
    rank: int, width: int, tokens: int, strength: float, seed: int
) -> None:
    """Any number of terms with gain and bias agrees with float64, in which each term reads the original x."""
    terms = random_terms(layer=0, rank=rank, width=width, seed=seed)
    x = residual_of(tokens, width, torch.float32, seed)
    expected = in_float64(x, terms, strength)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(
        apply_terms(x, terms, strength).double().numpy(), expected, rtol=0, atol=1e-5 * scale * rank
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """The result equals, bit for bit, the float32 result of the same numbers cast to the residual's dtype."""
    terms = random_terms(layer=0, rank=5, width=64, seed=4)
    x = residual_of(20, 64, dtype)
    edited = apply_terms(x, terms, 0.8)
    assert edited.dtype is dtype
    assert torch.equal(edited, apply_terms(x.float(), terms, 0.8).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_dtypes_stay_within_half_a_unit_of_float64(dtype: torch.dtype) -> None:
    """One rounding: the error against float64 is at most half a unit in the last place, and float32's own."""
    terms = random_terms(layer=0, rank=5, width=64, seed=5)
    x = residual_of(20, 64, dtype)
    expected = in_float64(x, terms, 1.3)
    error = np.abs(apply_terms(x, terms, 1.3).double().numpy() - expected)
    half_unit = np.abs(expected) * torch.finfo(dtype).eps / 2
    assert (error <= half_unit + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_per_row", [False, True])
def test_strength_zero_gives_every_bit_back(dtype: torch.dtype, is_per_row: bool) -> None:
    """Also the sign of zero, infinities and what is not a number; and the result is a copy."""
    x = residual_of(3, 16, dtype)
    x[0, :4] = torch.tensor([-0.0, 0.0, float("inf"), float("nan")])
    strength = torch.zeros(3) if is_per_row else 0.0
    edited = apply_terms(x, random_terms(layer=0, rank=3), strength)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(edited.view(bits), x.view(bits))
    assert edited.data_ptr() != x.data_ptr()


def test_rows_have_strengths_of_their_own() -> None:
    """A strength per row gives each row what that strength alone would give it."""
    x, terms = residual_of(4, 16, torch.float32), random_terms(layer=0, rank=2)
    strengths = torch.tensor([0.0, 1.0, -2.0, 0.5])
    together = apply_terms(x, terms, strengths)
    for row, strength in enumerate(strengths.tolist()):
        torch.testing.assert_close(together[row : row + 1], apply_terms(x[row : row + 1], terms, strength))
    np.testing.assert_allclose(together.double().numpy(), in_float64(x, terms, strengths.numpy()), rtol=1e-5, atol=1e-4)


def test_leading_dimensions_are_free_and_the_input_is_left_alone() -> None:
    """[B, S, D] is edited as its rows are, and the tensor given is not written."""
    x = residual_of(6, 16, torch.float32)
    before, terms = x.clone(), random_terms(layer=0, rank=2)
    cubic = apply_terms(x.reshape(2, 3, 16), terms, 0.5)
    torch.testing.assert_close(cubic.reshape(6, 16), apply_terms(x, terms, 0.5))
    assert torch.equal(x, before)


def test_another_width_is_refused_with_both_widths() -> None:
    """The message names the width given and the width needed."""
    with pytest.raises(BundleFormatError, match=r"width 8.*needs 16"):
        delta(torch.zeros(2, 8), random_terms(layer=0, rank=1), 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": -1}, "layer must be 0 or more"),
        ({"write": torch.ones(16)}, "write must be"),
        ({"write": torch.ones(MAX_RANK + 1, 16)}, "write must be"),
        ({"write": torch.ones(0, 16)}, "write must be"),
        ({"read": torch.ones(2, 15)}, "read.*shape"),
        ({"gain": torch.ones(3)}, "gain.*shape"),
        ({"bias": torch.ones(2, 1)}, "bias.*shape"),
        ({"bias": torch.ones(2, dtype=torch.float64)}, "bias.*dtype"),
        ({"write": torch.full((2, 16), float("nan"))}, "write.*not finite"),
        ({"gain": torch.tensor([1.0, float("inf")])}, "gain.*not finite"),
    ],
)
def test_terms_that_do_not_fit_together_are_refused(changed: dict[str, Any], message: str) -> None:
    """Shape, dtype, rank, layer and finiteness are checked when terms are made, and the message names the part."""
    good = random_terms(layer=0, rank=2)
    parts = {part: getattr(good, part) for part in ("layer", "read", "write", "gain", "bias")}
    with pytest.raises(BundleFormatError, match=message):
        LayerTerms(**(parts | changed))


def test_edits_list_each_layer_once_ascending_and_of_one_width() -> None:
    """An edit without layers, with a layer twice, out of order or of mixed widths cannot be made."""
    for layers in (
        (),
        (random_terms(layer=1, rank=1), random_terms(layer=1, rank=1)),
        (random_terms(layer=2, rank=1), random_terms(layer=1, rank=1)),
        (random_terms(layer=0, rank=1), random_terms(layer=1, rank=1, width=8)),
    ):
        with pytest.raises(BundleFormatError):
            Edit(name="e", layers=layers)


def test_layers_of_is_the_union_ascending() -> None:
    """Layers of several edits, each once, in order: the layers that carry the op."""
    assert layers_of([random_edit("a", ranks={3: 1, 1: 1}), random_edit("b", ranks={1: 2, 0: 1})]) == (0, 1, 3)
