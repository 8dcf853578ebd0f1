"""Stages `activations`, `openings` and `vectors`: residuals of every prompt, how refusals begin, and the directions.

Directions, at every layer: one per category in two variants, one of all categories together, and R4's benign refusal
(BR - BC: benign prompts that the model refuses against benign prompts that it answers). Means are summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.fit.activations import last_residuals
from steering.fit.arms import UNSTEERED, arm_codes, token_codes
from steering.fit.control import Fit, Settings, Variant
from steering.fit.datasets import thinned
from steering.fit.directions import ClassMean, difference, unit
from steering.fit.openings import Openings, find_openings
from steering.fit.prompts import CONTRAST_PARTS, Kind, Prompts, p1_prompts
from steering.fit.shards import Shards, write_shards

RESPOND = "[respond]"
POOLED, BENIGN_REFUSED, BENIGN_ANSWERED = "pooled", "benign refused", "benign answered"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """Residuals of the fitting and of the calibration prompts, on disk."""

    fitting: Shards
    calibrating: Shards
    facts: dict[str, Any]


def activations(fit: Fit, fitting: Prompts, calibrating: Prompts) -> Activations:
    """Residuals at the last prompt token, at every block, streamed to shards in the work folder."""
    folder = fit.work / "activations"
    identity = fit.identity("activations")
    written = {
        name: write_shards(
            fit.loaded,
            prompts.ids,
            folder,
            name,
            batch=fit.settings.batch,
            identity=identity,
            say=fit.say,
        )
        for name, prompts in (("fit", fitting), ("calibrate", calibrating))
    }

    def make() -> dict[str, Any]:
        # Float64 sums of float32 squares: one pass over each layer, for the picture and for scales.
        norms = []
        for layer in range(written["fit"].layers):
            total, count = 0.0, 0
            for _, batch in written["fit"].batches(layer):
                total += float(torch.linalg.vector_norm(batch, dim=-1).sum(dtype=torch.float64))
                count += len(batch)
            norms.append(total / count)
        return {
            "prompts": {"fit": fitting.counts(), "calibrate": calibrating.counts()},
            "count": {"fit": len(fitting.items), "calibrate": len(calibrating.items)},
            "content": {"fit": fitting.digest, "calibrate": calibrating.digest},
            "dropped": {"fit": fitting.dropped, "calibrate": calibrating.dropped},
            "bytes": sum(path.stat().st_size for shards in written.values() for path in shards.files),
            "residual_norm": norms,
        }

    facts = fit.stage(
        "activations",
        make,
        of=("most_per_set", "most_plain", "most_templates", "has_templates", "gated"),
        after=[{"digest": identity}, {"digest": fitting.digest}, {"digest": calibrating.digest}],
    )
    return Activations(fitting=written["fit"], calibrating=written["calibrate"], facts=facts)


def refusal_openings(fit: Fit, fitting: Prompts, after: Sequence[Mapping[str, Any]]) -> tuple[Openings, dict[str, Any]]:
    """How this model's refusals begin: its refusal tokens where it uses them, else found among its greedy answers."""

    def make() -> dict[str, Any]:
        harmful = [prompt.ids for prompt in fitting.items if prompt.label == "harmful"]
        plain = [prompt.ids for prompt in fitting.items if prompt.kind is Kind.PLAIN]
        return find_openings(fit.loaded, thinned(harmful, 300), thinned(plain, 300)).to_json()

    facts = fit.stage("openings", make, of=("most_per_set", "most_plain"), after=after)
    return Openings.from_json(facts), facts


def own_decisions(
    fit: Fit, openings: Openings, fitting: Prompts, shards: Shards, after: Sequence[Mapping[str, Any]]
) -> NDArray[np.int8]:
    """What the unsteered model does with prompts that should be answered, [N]; `NEITHER` for all others.

    The first tokens are known from the activations; a model without refusal tokens is asked about `most` prompts of
    either kind.
    """

    def make() -> dict[str, Any]:
        if openings.is_tokens:
            codes = token_codes(openings, fit.categories, shards.first_tokens())
            asked = list(range(len(codes)))
        else:
            asked = [
                index for kind in (Kind.OVER, Kind.PLAIN) for index in thinned(fitting.where(kind), fit.settings.most)
            ]
            ids = [fitting.items[index].ids for index in asked]
            codes = arm_codes(fit.loaded, openings, fit.categories, ids, [UNSTEERED])[0]
        known = np.full(len(fitting.items), -2, dtype=np.int8)
        known[asked] = codes
        return {"asked": len(asked), "tensors": {"codes": torch.from_numpy(known)}}

    fit.stage("answers", make, of=("most",), after=after)
    return np.asarray(fit.tensors("answers")["codes"].numpy())


def classes_of(fit: Fit, fitting: Prompts) -> dict[str, list[int]]:
    """Indices of the prompts to refuse of each category, those of templates left out."""
    return {
        name: [
            index
            for index, prompt in enumerate(fitting.items)
            if prompt.category == name and prompt.kind is Kind.REFUSE and prompt.group != "templates"
        ]
        for name in fit.categories
    }


def class_means(
    fit: Fit, openings: Openings, fitting: Prompts, shards: Shards, after: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Mean residuals [L, D] float64 by `<variant>/<class>`: categories, `[respond]`, pooled and benign ones."""
    own = own_decisions(fit, openings, fitting, shards, after)

    def make() -> dict[str, Any]:
        classes = {name: thinned(found, fit.settings.most) for name, found in classes_of(fit, fitting).items()}
        contrast = {f"{name}/{part}" for name, part in CONTRAST_PARTS}
        borderline = [index for index in fitting.where(Kind.OVER) if fitting.items[index].source in contrast]
        benign = [*fitting.where(Kind.OVER), *fitting.where(Kind.PLAIN)]
        groups = {
            **{f"{Variant.HEADER}/{name}": members for name, members in classes.items()},
            f"{Variant.HEADER}/{RESPOND}": thinned(
                [index for index in fitting.where(Kind.PLAIN) if fitting.items[index].group != "templates"],
                fit.settings.most,
            ),
            f"{Variant.HEADER}/{POOLED}": [index for members in classes.values() for index in members],
            f"{Variant.HEADER}/{BENIGN_REFUSED}": thinned(
                [index for index in benign if own[index] >= 0], 2 * fit.settings.most
            ),
            f"{Variant.HEADER}/{BENIGN_ANSWERED}": thinned(
                [index for index in benign if own[index] == -1], 2 * fit.settings.most
            ),
        }
        means = _shard_means(shards, {name: members for name, members in groups.items() if members})
        used = dict(groups)
        if openings.is_tokens:
            # Algorithm 1 reads on the category token, which is not in the prompts: these are read anew.
            seen = {
                name: p1_prompts(fit, fitting, members)
                for name, members in {**classes_of(fit, fitting), RESPOND: borderline}.items()
            }
            for name, members in ((name, thinned(found, fit.settings.most)) for name, found in seen.items()):
                token = fit.loaded.respond if name == RESPOND else fit.loaded.categories[name]
                assert token is not None
                means[f"{Variant.P1}/{name}"] = _mean(fit, [[*fitting.items[index].ids, token] for index in members])
                used[f"{Variant.P1}/{name}"] = members
        sources = {name: _sources(fitting, members) for name, members in used.items()}
        return {
            "prompts": {name: len(members) for name, members in used.items()},
            "sources": sources,
            "tensors": means,
        }

    facts = fit.stage("vectors", make, of=("most", "p1_sources"), after=after)
    return fit.tensors("vectors"), facts


def categorical(
    means: Mapping[str, Tensor], variant: Variant, category: str, layer: int, settings: Settings
) -> tuple[Tensor, float]:
    """The unit direction [D] of a category at a layer, and the norm of the difference before it was normalised."""
    return _direction(means[f"{variant}/{category}"], means[f"{variant}/{RESPOND}"], layer, settings)


def pooled(means: Mapping[str, Tensor], layer: int, settings: Settings) -> tuple[Tensor, float]:
    """The same for all categories together, at the last prompt token."""
    return categorical(means, Variant.HEADER, POOLED, layer, settings)


def benign_refusal(means: Mapping[str, Tensor], layer: int, settings: Settings) -> tuple[Tensor, float] | None:
    """R4's BR - BC at a layer; None where the model refuses, or answers, every benign prompt."""
    refused, answered = f"{Variant.HEADER}/{BENIGN_REFUSED}", f"{Variant.HEADER}/{BENIGN_ANSWERED}"
    if refused not in means or answered not in means:
        return None
    return _direction(means[refused], means[answered], layer, settings)


def cosines(directions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names, and their cosines as a matrix."""
    stacked = torch.stack([unit(direction) for direction in directions.values()])
    table = (stacked @ stacked.T).tolist()
    return {"names": list(directions), "cosines": [[round(float(value), 4) for value in row] for row in table]}


def _direction(refused: Tensor, answered: Tensor, layer: int, settings: Settings) -> tuple[Tensor, float]:
    raw = difference(refused[layer], answered[layer], tau=settings.tau, top_k=settings.top_k)
    return unit(raw), float(torch.linalg.vector_norm(raw))


def _shard_means(shards: Shards, groups: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Means [L, D] float64 of some groups' residuals, from one pass over the shards."""
    chosen = {name: torch.zeros(shards.count, dtype=torch.bool) for name in groups}
    for name, members in groups.items():
        chosen[name][list(members)] = True
    means: dict[str, list[Tensor]] = {name: [] for name in groups}
    for layer in range(shards.layers):
        sums = {name: ClassMean() for name in groups}
        for index, batch in shards.batches(layer):
            for name, mean in sums.items():
                rows = chosen[name][index]
                if bool(rows.any()):
                    mean.add(batch[rows])
        for name, mean in sums.items():
            means[name].append(mean.mean)
    return {name: torch.stack(layers) for name, layers in means.items()}


def _mean(fit: Fit, sequences: Sequence[Sequence[int]]) -> Tensor:
    mean = ClassMean()
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), 256):
        mean.add(last_residuals(fit.loaded, ordered[start : start + 256]))
    return mean.mean


def _sources(prompts: Prompts, members: Iterable[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for index in members:
        source = prompts.items[index].source
        counts[source] = counts.get(source, 0) + 1
    return dict(sorted(counts.items()))
