"""Arms: what prompts do under many edits, with the part of a pass that no edit changes made once.

An edit of scope `generated` leaves all but the last prompt token as they are, so that their keys and values serve every
arm. Knows nothing of data sets or bundles.

Shapes: `A` arms, `B` prompts of one batch, `N` prompts, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.fit.activations import LoadedModel, greedy, steered, steered_each
from steering.fit.intervals import Rate
from steering.fit.openings import Openings
from steering.fit.passes import Sequences, passes, prefix
from steering.terms import Edit

ANSWERED, NEITHER = -1, -2
Codes = NDArray[np.int8]
"""What prompts did: the index of the category they were refused under, the number of categories where the refusal names
none, `ANSWERED` or `NEITHER`."""


class Arm(NamedTuple):
    """An edit at a strength, either of which may differ by prompt [N]; no edit is the model alone."""

    edit: Edit | Sequence[Edit | None] | None = None
    strength: float | Tensor = 1.0


UNSTEERED = Arm()


@torch.inference_mode()
def arm_codes(
    loaded: LoadedModel,
    openings: Openings,
    categories: Sequence[str],
    sequences: Sequences,
    arms: Sequence[Arm],
) -> list[Codes]:
    """What each prompt does under each arm, read from the beginning of its greedy answer."""
    if not openings.is_tokens:
        return [_read(loaded, openings, categories, sequences, arm) for arm in arms]
    names = {opening.tokens[0]: _code(opening.category, categories) for opening in openings.refusals}
    result = [np.full(len(sequences), NEITHER, dtype=np.int8) for _ in arms]

    def take(number: int, indices: list[int], logits: Tensor) -> None:
        for index, token in zip(indices, logits.argmax(dim=-1).tolist(), strict=True):
            result[number][index] = names.get(token, ANSWERED if token == openings.respond else NEITHER)

    over_arms(loaded, sequences, arms, take)
    return result


def token_codes(openings: Openings, categories: Sequence[str], tokens: Tensor) -> Codes:
    """The same from greedy first tokens [N] that are known already; only for a model that decides by one token."""
    names = {opening.tokens[0]: _code(opening.category, categories) for opening in openings.refusals}
    return np.array(
        [names.get(token, ANSWERED if token == openings.respond else NEITHER) for token in tokens.tolist()],
        dtype=np.int8,
    )


def refusals(codes: Codes) -> Rate:
    """Share of prompts refused."""
    return Rate(count=int((codes >= 0).sum()), n=len(codes))


def neither(codes: Codes) -> Rate:
    """Share of prompts that are neither refused nor answered."""
    return Rate(count=int((codes == NEITHER).sum()), n=len(codes))


class Effects(NamedTuple):
    """What arms do to prompts: codes of each arm, and its mean KL(p_base ‖ p_steer) of the first token in nats."""

    codes: list[Codes]
    divergences: list[float]


@torch.inference_mode()
def arm_effects(
    loaded: LoadedModel,
    openings: Openings,
    categories: Sequence[str],
    sequences: Sequences,
    arms: Sequence[Arm],
) -> Effects:
    """Codes and divergences of arms, from the same passes where the model decides by one token."""
    sums = [0.0] * len(arms)
    tokens = torch.zeros(len(arms), len(sequences), dtype=torch.int64)
    base: dict[str, Tensor] = {}

    def take(number: int, indices: list[int], logits: Tensor) -> None:
        scores = torch.log_softmax(logits, dim=-1)
        if number == 0:
            base["scores"] = scores
            return
        divergence = torch.nn.functional.kl_div(scores, base["scores"], log_target=True, reduction="sum")
        sums[number - 1] += float(divergence)
        tokens[number - 1, indices] = logits.argmax(dim=-1)

    over_arms(loaded, sequences, [UNSTEERED, *arms], take)
    divergences = [total / max(1, len(sequences)) for total in sums]
    if openings.is_tokens:
        return Effects([token_codes(openings, categories, row) for row in tokens], divergences)
    return Effects(arm_codes(loaded, openings, categories, sequences, arms), divergences)


def over_arms(
    loaded: LoadedModel,
    sequences: Sequences,
    arms: Sequence[Arm],
    take: Callable[[int, list[int], Tensor], None],
) -> None:
    """Call `take(arm's number, indices of the prompts, logits [B, V] float32)` for every batch and arm, in order."""
    for indices, ids in passes(loaded, sequences, logits=1):
        for number, logits in enumerate(_logits(loaded, ids.to(loaded.model.device), indices, arms)):
            take(number, indices, logits.float().cpu())


def _logits(loaded: LoadedModel, ids: Tensor, indices: list[int], arms: Sequence[Arm]) -> Iterator[Tensor]:
    past = prefix(loaded, ids) if len(arms) > 1 else None
    for arm in arms:
        strength = arm.strength[indices] if isinstance(arm.strength, Tensor) else arm.strength
        with (
            steered(loaded, arm.edit, strength)
            if arm.edit is None or isinstance(arm.edit, Edit)
            else steered_each(loaded, [arm.edit[index] for index in indices], strength)
        ):
            if past is None:
                yield loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            else:
                output = loaded.model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
                past.crop(-1)
                yield output.logits[:, -1]


def _read(loaded: LoadedModel, openings: Openings, categories: Sequence[str], sequences: Sequences, arm: Arm) -> Codes:
    answers = greedy(loaded, sequences, arm.edit, arm.strength, new_tokens=openings.longest)
    result = np.full(len(sequences), ANSWERED, dtype=np.int8)
    for index, answer in enumerate(answers):
        opening = openings.of(answer)
        if opening is not None:
            result[index] = _code(opening.category, categories)
        elif not answer:
            result[index] = NEITHER
    return result


def _code(category: str | None, categories: Sequence[str]) -> int:
    return categories.index(category) if category in categories else len(categories)
