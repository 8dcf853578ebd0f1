"""Stages `low_rank` and `null_space`: the vector that P1 trains, and AlphaSteer's map.

Knows nothing of doses; `doses.py` finds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steering.fit.ability import ANSWER_TOKENS
from steering.fit.activations import tail_residuals
from steering.fit.arms import ANSWERED
from steering.fit.control import Fit, Preset, Variant
from steering.fit.datasets import thinned
from steering.fit.low_rank import steering_basis, train, whitening
from steering.fit.null_space import gram, near_null_basis, null_space_map
from steering.fit.openings import Openings, refusal_log_probability
from steering.fit.prompts import CONTRAST_PARTS, Kind, Prompts, p1_prompts
from steering.fit.shards import Shards
from steering.fit.vectors import categorical
from steering.terms import MAX_RANK, Edit, LayerTerms

NULL_SPACE_PROMPTS = 6000
"""Harmful prompts that the null-space map is fitted on at most."""


def low_rank_stage(
    fit: Fit,
    openings: Openings,
    means: Mapping[str, Tensor],
    fitting: Prompts,
    shards: Shards,
    layer: int,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The trained vector s, in float32, and how it was trained."""

    def make() -> dict[str, Any]:
        settings = fit.settings
        # Algorithm 2 takes the directions of Algorithm 1; without refusal tokens there are only the others.
        variant = Variant.P1 if openings.is_tokens else Variant.HEADER
        rows = [categorical(means, variant, name, layer, settings) for name in fit.categories]
        directions = torch.stack([direction for direction, _ in rows])
        contrast = {f"{name}/{part}" for name, part in CONTRAST_PARTS}
        benign = [index for index in fitting.where(Kind.OVER) if fitting.items[index].source in contrast]
        harmful = [
            index
            for index, prompt in enumerate(fitting.items)
            if prompt.kind is Kind.REFUSE and prompt.category is not None and prompt.group != "templates"
        ]
        benign, harmful = p1_prompts(fit, fitting, benign), p1_prompts(fit, fitting, harmful)
        if settings.preset is Preset.AUTO:
            benign, harmful = _telling(fit, openings, fitting, benign, harmful)
        counted = thinned(benign, settings.covariance_prompts)
        whitened = whitening(shards.layer(layer)[counted], settings.covariance, settings.epsilon)
        if len(counted) <= fit.loaded.width:
            fit.say(
                f"  covariance of {len(counted)} prompts for a residual of {fit.loaded.width}: of lower rank, so that "
                "the basis is mostly what no benign prompt shows"
            )
        basis = steering_basis(whitened.matrix, directions)
        _, gap = categorical(means, Variant.HEADER, settings.default_category, layer, settings)
        scale = gap if settings.is_scaled else 1.0
        trained = train(
            fit.loaded,
            openings,
            layer=layer,
            basis=basis,
            harmful=[fitting.items[index].ids for index in thinned(harmful, settings.trained)],
            benign=[fitting.items[index].ids for index in thinned(benign, settings.trained)],
            training=settings.training,
            scale=scale,
            seed=settings.seed,
            say=fit.say,
        )
        length = float(torch.linalg.vector_norm(trained.vector))
        projected = directions.to(torch.float64) @ basis
        return {
            "layer": layer,
            "covariance": settings.covariance,
            "added": whitened.added,
            "shrinkage": whitened.shrinkage,
            "prompts": {"covariance": len(counted), "training": settings.trained},
            "is_of_full_rank": len(counted) > fit.loaded.width,
            "scale": scale,
            "length": scale * length,
            "history": trained.history,
            "share_of_directions_in_basis": [float(row.norm()) for row in projected],
            "tensors": {"vector": trained.vector, "basis": basis.to(torch.float32)},
        }

    return fit.stage(
        "low_rank",
        make,
        of=(
            "preset",
            "covariance",
            "covariance_prompts",
            "p1_sources",
            "epsilon",
            "training",
            "trained",
            "is_scaled",
            "tau",
            "top_k",
            "default_category",
        ),
        after=after,
    )


def _telling(
    fit: Fit, openings: Openings, fitting: Prompts, contrast: list[int], harmful: list[int]
) -> tuple[list[int], list[int]]:
    """Benign prompts that the model answers, plain ones among them, and the harmful ones it is least sure to refuse.

    P1 takes contrast prompts as they come and harmful ones in their order. Where the model refuses what it was trained
    on, those teach nothing, and a KL term on contrast prompts that it refuses would keep it refusing them.
    """
    own = fit.tensors("answers")["codes"].tolist()
    half = fit.settings.covariance_prompts // 2
    plain = fitting.where(Kind.PLAIN)
    answered = thinned([index for index in contrast if own[index] == ANSWERED], half)
    answered += thinned([index for index in plain if own[index] == ANSWERED] or plain, half)
    asked = thinned(harmful, 5 * fit.settings.trained)
    with torch.inference_mode():
        sure = refusal_log_probability(
            fit.loaded, [fitting.items[index].ids for index in asked], openings, lambda _tail: nullcontext()
        )
    unsure = sure.argsort()[: fit.settings.trained].tolist()
    return answered, [asked[place] for place in sorted(unsure)]


def null_space_stage(
    fit: Fit,
    openings: Openings,
    means: Mapping[str, Tensor],
    fitting: Prompts,
    shards: Shards,
    layer: int,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The map at one layer, as terms, towards the difference of class means of each prompt's category."""

    def make() -> dict[str, Any]:
        settings = fit.settings
        benign = torch.zeros(shards.count, dtype=torch.bool)
        benign[fitting.where(Kind.PLAIN)] = True
        benign[fitting.where(Kind.OVER)] = True
        # Every token of an answer is edited too, so that what must stay includes the answers to plain prompts.
        answered = thinned(
            [
                [*prompt.ids, *([] if openings.respond is None else [openings.respond]), *prompt.answer[:ANSWER_TOKENS]]
                for prompt in fitting.items
                if prompt.kind is Kind.PLAIN and len(prompt.answer) >= ANSWER_TOKENS
            ],
            settings.trained,
        )
        basis = near_null_basis(
            gram(
                itertools.chain(
                    (batch[benign[index]] for index, batch in shards.batches(layer)),
                    tail_residuals(fit.loaded, answered, layer, ANSWER_TOKENS),
                )
            ),
            settings.null_share,
        )
        harmful = thinned(
            [
                index
                for index, prompt in enumerate(fitting.items)
                if prompt.kind is Kind.REFUSE and prompt.category is not None and prompt.group != "templates"
            ],
            NULL_SPACE_PROMPTS,
        )
        differences = torch.stack(
            [
                gap * direction
                for direction, gap in (
                    categorical(means, Variant.HEADER, name, layer, settings) for name in fit.categories
                )
            ]
        )
        residuals = shards.layer(layer)
        kinds = [fit.categories.index(str(fitting.items[index].category)) for index in harmful]
        found = null_space_map(residuals[harmful], kinds, differences, basis, settings.ridge)
        rank = min(MAX_RANK, len(found.gain))
        read, write, gain = (part[:rank].to(torch.float32).contiguous() for part in found)
        # Writes are orthonormal, so that what is added is as long as its coordinates along them.
        moved = torch.linalg.vector_norm(residuals @ read.T * gain, dim=-1)
        return {
            "layer": layer,
            "rank": rank,
            "null_directions": int(basis.shape[1]),
            "ridge": settings.ridge,
            "prompts": {"benign": int(benign.sum()), "answers": len(answered), "harmful": len(harmful)},
            "mean_addition": {
                "harmful": float(moved[harmful].mean()),
                "borderline": float(moved[fitting.where(Kind.OVER)].mean()),
                "plain": float(moved[fitting.where(Kind.PLAIN)].mean()),
            },
            "tensors": {"read": read, "write": write, "gain": gain},
        }

    return fit.stage("null_space", make, of=("null_share", "ridge", "tau", "top_k", "trained"), after=after)


def null_space_edit(fit: Fit, layer: int, multiple: float) -> Edit:
    """The map of the stage `null_space`, `multiple` times as strong."""
    found = fit.tensors("null_space")
    terms = LayerTerms(
        layer=layer,
        read=found["read"],
        write=found["write"],
        gain=multiple * found["gain"],
        bias=torch.zeros(len(found["gain"])),
    )
    return Edit(name="refuse-null-space", layers=(terms,))
