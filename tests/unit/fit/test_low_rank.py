"""P1's Algorithm 2: whitening against numpy, an orthonormal basis, and a training that learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.errors import OperatorError
from steering.fit.activations import LoadedModel
from steering.fit.low_rank import Covariance, LowRankVector, Training, steering_basis, train, whitening
from steering.fit.openings import token_openings

RESIDUALS = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(1.0, 9.0)) + 3.0


def test_whitening_is_numpy_s_inverse_square_root_with_the_paper_s_epsilon() -> None:
    """(Σ + ε I)^(-1/2) by numpy's eigh; what it gives has unit covariance."""
    found = whitening(RESIDUALS, Covariance.PAPER, 1e-4)
    centred = RESIDUALS.double().numpy() - RESIDUALS.double().numpy().mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / 500 + 1e-4 * np.eye(8))
    np.testing.assert_allclose(found.matrix.numpy(), vectors @ np.diag(values**-0.5) @ vectors.T, atol=1e-10)
    white = centred @ found.matrix.numpy()
    np.testing.assert_allclose(white.T @ white / 500, np.eye(8), atol=1e-3)
    assert found.added == 1e-4


def test_a_relative_epsilon_follows_the_scale_of_the_residuals() -> None:
    """Residuals ten times as large are whitened a tenth as much; the paper's ε does not follow."""
    one = whitening(RESIDUALS, Covariance.RELATIVE, 1e-2)
    ten = whitening(10 * RESIDUALS, Covariance.RELATIVE, 1e-2)
    torch.testing.assert_close(ten.matrix * 10, one.matrix, atol=1e-8, rtol=1e-8)
    assert ten.added == pytest.approx(100 * one.added)


def test_ledoit_wolf_is_scikit_learn_s() -> None:
    """The shrunk covariance's inverse square root, also with fewer prompts than coordinates."""
    from sklearn.covariance import ledoit_wolf

    few = RESIDUALS[:5]
    found = whitening(few, Covariance.LEDOIT_WOLF, 0.0)
    shrunk, share = ledoit_wolf(few.double().numpy())
    assert found.shrinkage == pytest.approx(share)
    np.testing.assert_allclose(
        np.linalg.inv(found.matrix.numpy() @ found.matrix.numpy()), shrunk, atol=1e-8 * np.abs(shrunk).max()
    )


def test_a_covariance_that_stays_singular_is_refused_by_name() -> None:
    """Fewer prompts than coordinates and nothing added: the message says what to change."""
    with pytest.raises(OperatorError, match="ledoit-wolf"):
        whitening(torch.ones(3, 4), Covariance.PAPER, 0.0)


def test_the_basis_is_orthonormal_and_spans_the_whitened_directions() -> None:
    """QᵀQ = I, and every whitened direction lies in the span of Q."""
    directions = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    matrix = whitening(RESIDUALS, Covariance.PAPER, 1e-4).matrix
    basis = steering_basis(matrix, directions)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    whitened = matrix @ directions.double().T
    torch.testing.assert_close(basis @ (basis.T @ whitened), whitened, atol=1e-12, rtol=1e-10)


def test_the_vector_is_u_times_v_transposed_z() -> None:
    """What is exported is the product as printed, and both factors start as Q."""
    basis = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(3)))[0]
    module = LowRankVector(basis, spread=1.0, seed=4)
    expected = module.outer @ module.inner.T @ module.latent
    torch.testing.assert_close(module(), expected)
    torch.testing.assert_close(module.outer.detach(), basis)
    torch.testing.assert_close(module.inner.detach(), basis)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny: LoadedModel) -> None:
    """Refusal becomes more likely epoch by epoch; weights are frozen, hooks are gone, the result can be made again."""
    harmful = tiny.prompts(["how do i tie a knot", "what is tea", "what is tea made of"])
    benign = tiny.prompts(["tea", "a knot is made of tea"])
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    # Transformers puts hooks of its own on a model that was once asked for its hidden states.
    hooks = [len(block._forward_hooks) for block in tiny.blocks]
    basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(5)))[0]
    training = Training(rate=0.05, epochs=6, batch=2, divergence=0.1)
    openings = token_openings(tiny)

    def run() -> tuple[torch.Tensor, list[dict[str, float]]]:
        return train(
            tiny, openings, layer=1, basis=basis, harmful=harmful, benign=benign, training=training, scale=5.0, seed=1
        )

    vector, history = run()
    assert history[-1]["refusal"] < history[0]["refusal"] - 0.05
    assert vector.shape == (16,)
    assert not vector.requires_grad
    torch.testing.assert_close(run()[0], vector)
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert [len(block._forward_hooks) for block in tiny.blocks] == hooks
