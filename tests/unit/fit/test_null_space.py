"""AlphaSteer's map: benign residuals stay, harmful ones move to their targets."""

from __future__ import annotations

import pytest
import torch

from steering.errors import OperatorError
from steering.fit.null_space import gram, near_null_basis, null_space_map
from steering.terms import LayerTerms, apply_terms


def _residuals() -> tuple[torch.Tensor, torch.Tensor]:
    """Benign residuals in the first 6 of 12 coordinates, but for noise; harmful ones in all."""
    generator = torch.Generator().manual_seed(0)
    benign = torch.randn(200, 12, generator=generator)
    benign[:, 6:] *= 0.01
    return benign, torch.randn(100, 12, generator=generator) + 2.0


def test_the_map_leaves_benign_residuals_alone_and_moves_harmful_ones_to_their_targets() -> None:
    """As an edit of rank 2, through the same terms as the engine's."""
    benign, harmful = _residuals()
    sides = torch.arange(100) % 2
    # Harmful prompts of two categories: their residuals differ in the null space, and so do their targets.
    harmful[:, 8] += 6.0 * (2 * sides - 1)
    kinds = torch.zeros(2, 12)
    kinds[0, 0], kinds[1, 1] = 3.0, -4.0
    targets = kinds[sides]
    basis = near_null_basis(gram([benign[:120], benign[120:]]), 0.5)
    read, write, gain = (part.float() for part in null_space_map(harmful, sides.tolist(), kinds, basis, ridge=1.0))
    terms = LayerTerms(layer=0, read=read, write=write, gain=gain, bias=torch.zeros(2))
    assert float((apply_terms(benign, terms, 1.0) - benign).norm(dim=-1).max()) < 0.15
    moved = apply_terms(harmful, terms, 1.0) - harmful
    assert float((moved - targets).norm(dim=-1).mean()) < 1.5
    assert float(moved[sides == 0, 0].mean()) == pytest.approx(3.0, abs=0.5)
    assert float(moved[sides == 1, 1].mean()) == pytest.approx(-4.0, abs=0.6)


def test_the_map_is_the_paper_s_formula() -> None:
    """R H_mᵀ P (P H_m H_mᵀ P + a P)^+ P with the projector written out and a pseudo-inverse."""
    benign, harmful = (part.double() for part in _residuals())
    kinds = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).double()
    members = [index % 3 for index in range(100)]
    targets = kinds[members]
    basis = near_null_basis(gram([benign]), 0.4)
    projector = basis @ basis.T
    columns = harmful.T
    inner = projector @ columns @ columns.T @ projector + 10.0 * projector
    expected = targets.T @ columns.T @ projector @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-10) @ projector
    read, write, gain = null_space_map(harmful, members, kinds, basis, 10.0)
    torch.testing.assert_close(write.T @ torch.diag(gain) @ read, expected, atol=1e-9, rtol=1e-7)
    for sides in (read, write):
        torch.testing.assert_close(sides @ sides.T, torch.eye(3).double(), atol=1e-12, rtol=0)


def test_a_share_outside_its_range_and_no_benign_prompts_are_errors() -> None:
    """The message names the number."""
    with pytest.raises(OperatorError, match=r"1\.5"):
        near_null_basis(torch.eye(4), 1.5)
    with pytest.raises(OperatorError, match="benign"):
        gram([])
