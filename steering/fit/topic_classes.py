"""Classes of prompts by refusal confidence: refused, answered and neutral, with the weights of P2's eq. 3.

Pure maths on arrays. Knows nothing of residuals, models or judges.

Shapes: `N` prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import TooFewPrompts

BAND = 0.15
"""P2: prompts with |c| up to this are neutral while vectors are made."""

LEAST = 8
"""Prompts a class needs: a mean of fewer says more of the prompts than of the refusal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classes:
    """Prompts by confidence.

    Attributes:
        confidence: [N] float64 in [-1, 1]; 1 is refused for sure.
        refused, answered, neutral: indices, int64, ascending; c > band, c < -band and the rest.
        band: half the width of the neutral band.
    """

    confidence: Tensor
    refused: Tensor
    answered: Tensor
    neutral: Tensor
    band: float

    @property
    def weights(self) -> Tensor:
        """[N] float64: |c|, the weights of the weighted means and covariance."""
        return self.confidence.abs()

    def counts(self) -> dict[str, int]:
        """Prompts of each class."""
        return {"refused": len(self.refused), "answered": len(self.answered), "neutral": len(self.neutral)}

    def resampled(self, generator: torch.Generator) -> Classes:
        """The classes with as many prompts each, drawn with replacement: one round of a bootstrap."""

        def drawn(rows: Tensor) -> Tensor:
            return rows[torch.randint(len(rows), (len(rows),), generator=generator)] if len(rows) else rows

        return Classes(
            confidence=self.confidence,
            refused=drawn(self.refused),
            answered=drawn(self.answered),
            neutral=drawn(self.neutral),
            band=self.band,
        )


def classes_of(confidence: Tensor, *, band: float = BAND, least: int = LEAST) -> Classes:
    """Sort prompts into classes by their confidence [N].

    Raises:
        TooFewPrompts: a class has fewer than `least` prompts; says how the confidences lie and what to do.
    """
    wide = confidence.to(torch.float64)
    if wide.dim() != 1 or not bool(torch.isfinite(wide).all()) or bool((wide.abs() > 1.0).any()):
        raise TooFewPrompts(f"confidences must be numbers from -1 to 1, one for each prompt; got {tuple(wide.shape)}")
    found = Classes(
        confidence=wide,
        refused=torch.nonzero(wide > band).flatten(),
        answered=torch.nonzero(wide < -band).flatten(),
        neutral=torch.nonzero(wide.abs() <= band).flatten(),
        band=band,
    )
    small = {name: count for name, count in found.counts().items() if name != "neutral" and count < least}
    if small:
        raise TooFewPrompts(_advice(found, small, least))
    return found


def _advice(found: Classes, small: dict[str, int], least: int) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in found.counts().items())
    told = f"{len(found.confidence)} judged prompts are {counts} (band {found.band:g}); at least {least} are needed of "
    told += " and ".join(small)
    if not len(found.confidence):
        return told + "; give files with prompts by --refused and --answered"
    if len(found.neutral) == len(found.confidence):
        return told + (
            "; the judge is undecided on every prompt: more samples (--samples), another judge (--judge), or a smaller "
            "--band, which may be 0"
        )
    if "refused" in small and "answered" not in small:
        return told + "; the model answers nearly all of them: add prompts that it refuses by --refused"
    if "answered" in small and "refused" not in small:
        return told + "; the model refuses nearly all of them: add prompts that it answers by --answered"
    return told + "; add prompts of either kind"
