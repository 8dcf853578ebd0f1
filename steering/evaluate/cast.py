"""CAST's condition (Lee et al. 2409.05907) through transformers, since it is not linear and the engine's gate is.

    fires where cos(h, tanh(proj_c h)) is past a threshold,  h: mean residual over the prompt's tokens at one layer

c is the first principal component of harmful and harmless prompts about their common mean, one per layer; layer,
threshold and side are those of the best F1 on the same prompts, as in the paper. Fitted on the fitting part of CAST's
own data. Which edit is applied where it fires is the arm's business.

As printed the cosine is the same for h·c and -h·c. Residuals of a large model lie on one side of zero; the demo's
harmful and harmless ones lie on either, which the formula folds onto each other (F1 0.83 where a cut of h·c has 0.94).
So the cosine with the sign of h·c is searched as well, and what has the better F1 is kept.

Shapes: `N` prompts, `L` layers, `D` width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.fit.activations import LoadedModel
from steering.fit.datasets import DataDirectory, Record, fit_records, thinned
from steering.fit.passes import Sequences, passes

FITTED = 600
"""Prompts of either kind, evenly spaced; the paper has 4,050."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When CAST steers.

    Attributes:
        layer: 0-based, output of the decoder block.
        direction: c, [D] float32, unit norm.
        threshold: of the similarity.
        is_above: fires at or above the threshold; else below it.
        is_signed: the similarity has the sign of h·c, which the paper's has not.
        f1: on the prompts it was chosen on.
        fitted: prompts of either kind.
    """

    layer: int
    direction: Tensor
    threshold: float
    is_above: bool
    is_signed: bool
    f1: float
    fitted: int

    def to_json(self) -> dict[str, Any]:
        """For a report; the direction is left out."""
        return {
            "layer": self.layer,
            "threshold": round(self.threshold, 6),
            "fires": "at or above" if self.is_above else "below",
            "similarity": "as printed, with the sign of h·c" if self.is_signed else "as printed",
            "f1_where_fitted": round(self.f1, 4),
            "prompts_of_either_kind": self.fitted,
            "computed": "outside the engine, through transformers in float32; where it fires mode refuse is asked for",
        }


def similarity(residuals: Tensor, direction: Tensor, *, is_signed: bool = False) -> Tensor:
    """cos(h, tanh(proj_c h)) of residuals [N, D] for a unit direction [D]; [N]. `is_signed`: times the sign of h·c."""
    along = residuals @ direction
    found = nn.functional.cosine_similarity(residuals, torch.tanh(along[:, None] * direction), dim=-1)
    return torch.sign(along) * found if is_signed else found


def condition_direction(harmful: Tensor, harmless: Tensor) -> Tensor:
    """First principal component of residuals [N, D] of both kinds about their mean; [D] unit norm, towards harm."""
    both = torch.cat([harmful, harmless]).double()
    _, _, right = torch.linalg.svd(both - both.mean(dim=0), full_matrices=False)
    direction: Tensor = right[0]
    if ((harmful.double().mean(dim=0) - harmless.double().mean(dim=0)) @ direction).item() < 0:
        direction = -direction
    return direction.float()


def best_threshold(harmful: Tensor, harmless: Tensor) -> tuple[float, float, bool]:
    """The best F1 of flagging similarities [N], its threshold, and whether it flags from there upwards."""
    values = torch.cat([harmful, harmless]).unique()
    cuts = torch.cat([values, values[-1:] + 1e-6])
    hits_below = torch.searchsorted(harmful.sort().values, cuts).double()
    alarms_below = torch.searchsorted(harmless.sort().values, cuts).double()
    found = []
    for is_above in (True, False):
        hits = len(harmful) - hits_below if is_above else hits_below
        alarms = len(harmless) - alarms_below if is_above else alarms_below
        scores = 2 * hits / (hits + alarms + len(harmful))
        best = int(scores.argmax())
        found.append((float(scores[best]), float(cuts[best]), is_above))
    return max(found)


def fit_condition(loaded: LoadedModel, directory: DataDirectory, most: int = FITTED) -> Condition:
    """Search layers, thresholds, sides and both similarities on the fitting part of CAST's prompts.

    Raises:
        DatasetError: the set is not there or not what the registry says.
    """
    kinds = []
    for part in ("harmful", "harmless"):
        records = thinned(fit_records(directory, [("cast_conditions", part)]).records, most)
        kinds.append(mean_residuals(loaded, loaded.prompts([record.prompt for record in records])))
    harmful, harmless = kinds
    found: list[Condition] = []
    for layer in range(harmful.shape[1]):
        direction = condition_direction(harmful[:, layer], harmless[:, layer])
        for is_signed in (False, True):
            f1, threshold, is_above = best_threshold(
                *(similarity(kind[:, layer], direction, is_signed=is_signed) for kind in (harmful, harmless))
            )
            found.append(
                Condition(
                    layer=layer,
                    direction=direction,
                    threshold=threshold,
                    is_above=is_above,
                    is_signed=is_signed,
                    f1=f1,
                    fitted=min(len(harmful), len(harmless)),
                )
            )
    return max(found, key=lambda condition: condition.f1)


def fires(loaded: LoadedModel, condition: Condition, records: Sequence[Record], longest: int | None) -> dict[str, bool]:
    """Whether the condition fires, by key of the prompt; prompts of more than `longest` tokens are left out."""
    prompts = {record.key: loaded.prompt(record.prompt) for record in records}
    kept = {key: ids for key, ids in prompts.items() if longest is None or len(ids) <= longest}
    residuals = mean_residuals(loaded, list(kept.values()))[:, condition.layer]
    found = similarity(residuals, condition.direction, is_signed=condition.is_signed)
    flagged = found >= condition.threshold if condition.is_above else found < condition.threshold
    return dict(zip(kept, flagged.tolist(), strict=True))


@torch.inference_mode()
def mean_residuals(loaded: LoadedModel, sequences: Sequences) -> Tensor:
    """Residuals at the output of every block, averaged over all tokens of each sequence; [N, L, D] float32, CPU."""
    result = torch.empty(len(sequences), len(loaded.blocks), loaded.width)
    for indices, ids in passes(loaded, sequences):
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer, block in enumerate(loaded.blocks):
                stack.callback(block.register_forward_hook(_keeper(kept, layer)).remove)
            loaded.model.get_decoder()(input_ids=ids.to(loaded.model.device), use_cache=False)
        result[indices] = torch.stack([kept[layer].cpu() for layer in range(len(loaded.blocks))], dim=1)
    return result


def _keeper(kept: dict[int, Tensor], layer: int) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept[layer] = hidden.float().mean(dim=1)

    return keep
