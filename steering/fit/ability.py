"""Ability: how well a steered model still predicts given answers, and whether its own answers are well formed.

Knows nothing of doses or thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steering.fit.activations import LoadedModel, steered_each
from steering.fit.intervals import Rate
from steering.fit.openings import Openings
from steering.fit.passes import passes
from steering.terms import Edit

ANSWER_TOKENS = 24
"""Tokens of an answer that ability is measured on."""


class Fed(NamedTuple):
    """What a model makes of answers that are fed in: mean next-token loss in nats, and its most likely tokens."""

    loss: float
    greedy: Tensor


def answer_loss(
    loaded: LoadedModel, answered: Sequence[tuple[list[int], list[int]]], edit: Edit | None = None
) -> float:
    """Mean next-token loss of given answers, in nats, under one edit; see `fed`."""
    return fed(loaded, answered, [edit] * len(answered)).loss


@torch.inference_mode()
def fed(
    loaded: LoadedModel,
    answered: Sequence[tuple[list[int], list[int]]],
    edits: Sequence[Edit | None],
    strengths: Tensor | None = None,
) -> Fed:
    """Feed in answers of one length, every position from the last prompt token on edited.

    The first token of an answer is the decision and is left out: `greedy` is [N, length - 1].
    """
    if not answered:
        return Fed(0.0, torch.empty(0, 0, dtype=torch.int64))
    length = len(answered[0][1])
    total = 0.0
    found = torch.empty(len(answered), length - 1, dtype=torch.int64)
    sequences = [[*prompt, *answer[:-1]] for prompt, answer in answered]
    for indices, ids in passes(loaded, sequences, logits=length):
        shares = 1.0 if strengths is None else strengths[indices]
        with steered_each(loaded, [edits[index] for index in indices], shares, tail=length):
            output = loaded.model(input_ids=ids.to(loaded.model.device), use_cache=False, logits_to_keep=length)
        scores = torch.log_softmax(output.logits.float().cpu(), dim=-1)[:, 1:]
        wanted = torch.tensor([answered[index][1][1:] for index in indices]).unsqueeze(-1)
        total -= float(scores.gather(-1, wanted).sum(dtype=torch.float64))
        found[indices] = scores.argmax(dim=-1)
    return Fed(total / found.numel(), found)


def of_common_length(prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """At most `most` prompts from the largest groups of equal length, which are generated together."""
    counts = Counter(len(prompt) for prompt in prompts)
    return sorted(prompts, key=lambda prompt: (-counts[len(prompt)], len(prompt)))[:most]


def well_formed(openings: Openings, answers: Sequence[Sequence[int]]) -> Rate:
    """Share of answers that do not run in circles or stutter and, where the model decides by a token, begin so."""
    decisions = {opening.tokens[0] for opening in openings.refusals} | {openings.respond}
    good = sum(
        bool(answer) and (not openings.is_tokens or answer[0] in decisions) and not _circles(answer)
        for answer in answers
    )
    return Rate(count=good, n=len(answers))


def _circles(answer: Sequence[int], run: int = 4, times: int = 3) -> bool:
    if len(answer) >= run * times and len(set(answer)) * 3 < len(answer):
        return True
    runs = [tuple(answer[start : start + run]) for start in range(len(answer) - run + 1)]
    return any(runs.count(found) >= times for found in set(runs))
