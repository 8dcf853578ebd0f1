"""Terms and edits: the one algebra of every intervention, and its plain torch reference.

    x' = x + strength · Σ_i ( gain_i · <x, q_i> + bias_i ) · p_i

All reads see the unedited residual `x` of that layer. Knows nothing of models, files, HTTP or vLLM.

Shapes: `T` tokens, `R` terms of one layer, `D` width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import BundleFormatError

MAX_RANK = 32
"""Most terms an edit may have at one layer; the kernel walks them one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTerms:
    """The stacked terms of an edit at one layer.

    Attributes:
        layer: 0-based index of the decoder block whose output is edited.
        read: [R, D] float32, directions `q` whose coefficient is read; rows with gain 0 are not read.
        write: [R, D] float32, directions `p` that are added.
        gain: [R] float32, multiplies what was read.
        bias: [R] float32, in units of the residual stream when `p` is a unit vector.
    """

    layer: int
    read: Tensor
    write: Tensor
    gain: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise BundleFormatError(f"layer must be 0 or more, got {self.layer}")
        rank, width = self.write.shape if self.write.dim() == 2 else (0, 0)
        if not 1 <= rank <= MAX_RANK:
            raise BundleFormatError(
                f"layer {self.layer}: write must be [R, D], 1 <= R <= {MAX_RANK}, got {tuple(self.write.shape)}"
            )
        wanted = {"read": (rank, width), "write": (rank, width), "gain": (rank,), "bias": (rank,)}
        for name, shape in wanted.items():
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise BundleFormatError(f"{name} at layer {self.layer} has shape {tuple(tensor.shape)}, needs {shape}")
            if tensor.dtype != torch.float32:
                raise BundleFormatError(f"{name} at layer {self.layer} has dtype {tensor.dtype}, needs torch.float32")
            if not bool(torch.isfinite(tensor).all()):
                raise BundleFormatError(f"{name} at layer {self.layer} has numbers that are not finite")

    @property
    def rank(self) -> int:
        """Number of terms, R."""
        return int(self.write.shape[0])

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return int(self.write.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """A named set of terms over one or more layers, at its calibrated dose (strength 1).

    Attributes:
        name: unique within a bundle.
        layers: one entry per edited layer, in ascending order of layer, all of one width.
    """

    name: str
    layers: tuple[LayerTerms, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise BundleFormatError(f"edit {self.name!r} has no terms")
        indices = [terms.layer for terms in self.layers]
        if indices != sorted(set(indices)):
            raise BundleFormatError(f"edit {self.name!r} must list each layer once, ascending; got {indices}")
        widths = {terms.width for terms in self.layers}
        if len(widths) != 1:
            raise BundleFormatError(f"edit {self.name!r} mixes residual widths {sorted(widths)}")

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return self.layers[0].width


def added_direction(*, layer: int, direction: Tensor, coefficient: float) -> LayerTerms:
    """Add `coefficient · direction`: P1 categorical and low-rank vectors, P2 additive.

    Args:
        layer: decoder block whose output is edited.
        direction: [D]; a unit vector makes `coefficient` the length of the addition.
        coefficient: signed length at strength 1.
    """
    write = direction.detach().to(torch.float32).reshape(1, -1)
    return LayerTerms(
        layer=layer,
        read=torch.zeros_like(write),
        write=write,
        gain=torch.zeros(1),
        bias=torch.tensor([float(coefficient)]),
    )


def ablated_direction(*, layer: int, direction: Tensor) -> LayerTerms:
    """Remove what the residual has along `direction` [D], a unit vector; strength 0…1 is the share removed."""
    unit = direction.detach().to(torch.float32).reshape(1, -1)
    return LayerTerms(layer=layer, read=unit, write=unit, gain=torch.tensor([-1.0]), bias=torch.zeros(1))


def repositioned_direction(*, layer: int, direction: Tensor, target: float) -> LayerTerms:
    """Set the coefficient along `direction` [D], a unit vector, to `target` (P2's reposition: <o,v> + α·s_l)."""
    unit = direction.detach().to(torch.float32).reshape(1, -1)
    return LayerTerms(layer=layer, read=unit, write=unit, gain=torch.tensor([-1.0]), bias=torch.tensor([float(target)]))


def low_rank_map(*, layer: int, matrix: Tensor, rank: int) -> LayerTerms:
    """The best rank-`rank` approximation of the linear map x' = x + matrix · x, by singular value decomposition.

    Args:
        layer: decoder block whose output is edited.
        matrix: [D, D], maps the residual to what is added to it.
        rank: number of terms kept, largest singular values first.
    """
    left, singular, right = torch.linalg.svd(matrix.detach().to(torch.float64), full_matrices=False)
    return LayerTerms(
        layer=layer,
        read=right[:rank].to(torch.float32).contiguous(),
        write=left[:, :rank].T.to(torch.float32).contiguous(),
        gain=singular[:rank].to(torch.float32),
        bias=torch.zeros(rank),
    )


def apply_terms(residual: Tensor, terms: LayerTerms, strength: float | Tensor) -> Tensor:
    """The reference: one layer's terms applied to every row of `residual`.

    Args:
        residual: [T, D] or [..., D], any float dtype. Not modified.
        terms: the edit's terms at this layer, on any device.
        strength: one number, or one per row shaped [...]; 0 gives back `residual` bit for bit.

    Returns:
        The edited residual in the dtype and on the device of `residual`; sums are made in float32 and rounded once.

    Raises:
        BundleFormatError: the last dimension of `residual` is not the edit's width.
    """
    edited = (residual.to(torch.float32) + delta(residual, terms, strength)).to(residual.dtype)
    if not isinstance(strength, Tensor):
        return edited if strength else residual.clone()
    # Chosen, not computed: adding 0 turns -0 into 0, and infinity times 0 is not a number.
    return torch.where((strength.to(residual.device) == 0).unsqueeze(-1), residual, edited)


def delta(residual: Tensor, terms: LayerTerms, strength: float | Tensor) -> Tensor:
    """What `apply_terms` adds, in float32: strength · Σ_i ( gain_i · <x, q_i> + bias_i ) · p_i."""
    if residual.shape[-1] != terms.width:
        raise BundleFormatError(f"residual has width {residual.shape[-1]}, the edit needs {terms.width}")
    device = residual.device
    read, write = terms.read.to(device), terms.write.to(device)
    coefficients = residual.to(torch.float32) @ read.T * terms.gain.to(device) + terms.bias.to(device)
    if isinstance(strength, Tensor):
        strength = strength.to(device=device, dtype=torch.float32).unsqueeze(-1)
    return (coefficients * strength) @ write


def layers_of(edits: Iterable[Edit]) -> tuple[int, ...]:
    """Every layer that some edit touches, ascending."""
    return tuple(sorted({terms.layer for edit in edits for terms in edit.layers}))
