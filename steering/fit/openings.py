"""Refusal openings: the token sequences a model's refusals begin with.

A model with refusal tokens has one opening per token. For any other model they are found among the beginnings of its
own greedy answers: those that are frequent on harmful prompts and far rarer on plain ones. No opening begins another,
so that the events exclude each other and the probability of a refusal is the sum of the openings' sequence
probabilities.

Shapes: `N` prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from steering.errors import NotSupported
from steering.fit.activations import LoadedModel, greedy
from steering.fit.passes import Sequences, branch, passes, prefix

LONGEST = 5
"""Most tokens of an opening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One way to begin a refusal.

    Attributes:
        tokens: ids.
        text: what they read as.
        category: whose refusal it is; None where it does not say.
        harmful, plain: share of greedy answers to prompts of either kind that begin so.
    """

    tokens: tuple[int, ...]
    text: str
    category: str | None = None
    harmful: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Openings:
    """All the ways a model begins a refusal.

    Attributes:
        refusals: none begins another.
        respond: the token an answer begins with, where the model has one.
        found: how, in one sentence.
    """

    refusals: tuple[Opening, ...]
    respond: int | None
    found: str

    @property
    def longest(self) -> int:
        """Most tokens of an opening: how far an answer must be read to know."""
        return max(len(opening.tokens) for opening in self.refusals)

    @property
    def is_tokens(self) -> bool:
        """The model says by one token whether it refuses or answers."""
        return self.respond is not None and self.longest == 1

    def of(self, answer: Sequence[int]) -> Opening | None:
        """The opening that an answer begins with."""
        for opening in self.refusals:
            if tuple(answer[: len(opening.tokens)]) == opening.tokens:
                return opening
        return None

    def to_json(self) -> dict[str, Any]:
        """For stage files and reports."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Openings:
        """Read what `to_json` wrote."""
        refusals = tuple(Opening(**{**opening, "tokens": tuple(opening["tokens"])}) for opening in fields["refusals"])
        return cls(refusals=refusals, respond=fields["respond"], found=fields["found"])


def token_openings(loaded: LoadedModel) -> Openings:
    """The refusal tokens of a model that has them.

    Raises:
        NotSupported: it has none.
    """
    if loaded.respond is None or not loaded.categories:
        raise NotSupported(f"{loaded.path} has no refusal tokens, so its first token is no decision")
    refusals = tuple(
        Opening(tokens=(token,), text=f"[{name}]", category=name) for name, token in loaded.categories.items()
    )
    return Openings(refusals=refusals, respond=loaded.respond, found="the model's refusal tokens")


def find_openings(loaded: LoadedModel, harmful: Sequences, plain: Sequences) -> Openings:
    """The model's refusal tokens where it uses them, else the openings found among its greedy answers.

    A vocabulary may hold refusal tokens that the model never says (a model fine-tuned from one that had them), so that
    what counts is whether most answers begin with one.
    """
    answers = greedy(loaded, harmful, new_tokens=LONGEST + 1)
    if loaded.respond is not None and loaded.categories:
        decisions = {loaded.respond, *loaded.categories.values()}
        if 2 * sum(bool(answer) and answer[0] in decisions for answer in answers) > len(answers):
            return token_openings(loaded)
    others = greedy(loaded, plain, new_tokens=LONGEST + 1)
    refusals = distinctive_openings(answers, others, decode=lambda ids: str(loaded.tokenizer.decode(list(ids))))
    if not refusals:
        raise NotSupported(
            f"no refusal openings found in {len(answers)} greedy answers of {loaded.path} to harmful prompts; a model "
            "that refuses nothing has no refusal to control"
        )
    return Openings(
        refusals=refusals,
        respond=None,
        found=f"beginnings of greedy answers to {len(answers)} harmful fit prompts that are at least 10 times as "
        f"frequent there as among {len(others)} plain ones; the probability of a refusal is the sum of their sequence "
        "probabilities",
    )


def distinctive_openings(
    harmful: Sequences,
    plain: Sequences,
    *,
    decode: Callable[[Sequence[int]], str],
    least: float = 0.02,
    times: float = 10.0,
    kept: float = 0.9,
    longest: int = LONGEST,
) -> tuple[Opening, ...]:
    """Beginnings of answers to harmful prompts that are frequent there and rare among those to plain prompts.

    Each is lengthened for as long as one continuation holds most of it, so that an opening is as specific as the
    model's habit; one that is frequent on plain prompts as well is split into its continuations.

    Args:
        harmful, plain: answers as token ids.
        least: share of answers to harmful prompts that an opening has at least.
        times: how much more frequent than on plain prompts, with half an answer added to either count.
        kept: share of an opening that a continuation must hold to replace it.
    """
    counts, others = _beginnings(harmful, longest), _beginnings(plain, longest)

    def is_distinctive(beginning: tuple[int, ...]) -> bool:
        ratio = (counts[beginning] + 0.5) / (len(harmful) + 1) / ((others[beginning] + 0.5) / (len(plain) + 1))
        return ratio >= times

    chosen: list[tuple[int, ...]] = []
    waiting: list[tuple[int, ...]] = [beginning for beginning in counts if len(beginning) == 1]
    while waiting:
        beginning = waiting.pop()
        if counts[beginning] < max(2.0, least * len(harmful)):
            continue
        continuations = [longer for longer in counts if len(longer) == len(beginning) + 1 and longer[:-1] == beginning]
        main = max(continuations, key=lambda longer: counts[longer], default=None)
        if main is not None and counts[main] >= kept * counts[beginning]:
            waiting.append(main)
        elif is_distinctive(beginning):
            chosen.append(beginning)
        else:
            waiting.extend(continuations)
    return tuple(
        Opening(
            tokens=beginning,
            text=decode(beginning),
            harmful=round(counts[beginning] / len(harmful), 4),
            plain=round(others[beginning] / max(1, len(plain)), 4),
        )
        for beginning in sorted(chosen, key=lambda beginning: (-counts[beginning], beginning))
    )


def refusal_log_probability(
    loaded: LoadedModel,
    prompts: Sequences,
    openings: Openings,
    editing: Callable[[int], AbstractContextManager[None]],
) -> Tensor:
    """Log-probability [N] float32 that an answer begins with one of the openings; keeps gradients.

    Args:
        editing: makes the context that edits the last positions of a pass; told how many: the last prompt token and
            the tokens of the opening that are fed in.
    """
    result: list[Tensor | None] = [None] * len(prompts)
    lengths = sorted({len(opening.tokens) for opening in openings.refusals})
    for indices, ids in passes(loaded, prompts, logits=max(lengths)):
        read = reading(loaded, ids.to(loaded.model.device), editing)
        parts: list[Tensor] = []
        for length in lengths:
            alike = [opening.tokens for opening in openings.refusals if len(opening.tokens) == length]
            if length == 1:
                scores = read(())[:, 0]
                parts += [scores[:, tokens[0]] for tokens in alike]
                continue
            for tokens in alike:
                scores = read(tokens[:-1])
                wanted = torch.tensor(tokens, device=scores.device).expand(len(indices), -1).unsqueeze(-1)
                parts.append(scores.gather(-1, wanted).squeeze(-1).sum(dim=-1))
        total = torch.logsumexp(torch.stack(parts), dim=0)
        for row, index in enumerate(indices):
            result[index] = total[row].cpu()
    return torch.stack([value for value in result if value is not None]) if result else torch.empty(0)


def reading(
    loaded: LoadedModel, ids: Tensor, editing: Callable[[int], AbstractContextManager[None]]
) -> Callable[[Sequence[int]], Tensor]:
    """Gives log-probabilities [B, 1 + n, V] from the last prompt token of `ids` [B, S] on, n tokens being fed in.

    No edit reaches the tokens before, so that they are read once, and gradients never need them.
    """
    with torch.no_grad():
        past = prefix(loaded, ids)

    def read(tokens: Sequence[int]) -> Tensor:
        tail = torch.tensor(tokens, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        begin = ids if past is None else ids[:, -1:]
        with editing(1 + len(tokens)):
            logits = loaded.model(
                input_ids=torch.cat([begin, tail], dim=1),
                past_key_values=None if past is None else branch(past),
                use_cache=past is not None,
                logits_to_keep=1 + len(tokens),
            ).logits
        return torch.log_softmax(logits.float(), dim=-1)

    return read


def _beginnings(answers: Sequences, longest: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(answer[:length]) for answer in answers for length in range(1, min(longest, len(answer)) + 1))
