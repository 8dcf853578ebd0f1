"""Passes: which sequences are run together, so that nothing is padded and a pass fits in memory; and prefixes shared.

Sequences are grouped by length: exact for every architecture, hybrid ones too. Knows nothing of edits or data sets.

Shapes: `B` sequences of one pass, `S` their length, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from steering.fit.activations import LoadedModel

Sequences = Sequence[Sequence[int]]
MAX_GROUP = 64
MAX_TOKENS = 8192
"""Most tokens of one forward pass."""
PASS_BYTES = 640 * 1024 * 1024
"""What the tokens of a pass may take beside the weights, as long as one sequence takes no more."""


def by_length(
    sequences: Sequences, most: int = MAX_GROUP, *, tokens: int | None = None, new: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """Groups of at most `most` sequences of one length: their indices, and their ids as [B, S].

    Args:
        tokens: most of one group, those counted that will be generated; no limit but `MAX_TOKENS` where not given.
        new: tokens that will be generated after each sequence, or that logits of its end weigh as much as.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        groups[len(sequence)].append(index)
    for length, members in sorted(groups.items()):
        size = min(most, MAX_TOKENS // max(1, length))
        if tokens is not None:
            size = min(size, tokens // max(1, length + new))
        size = max(1, size)
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            yield chosen, torch.tensor([list(sequences[index]) for index in chosen])


def passes(
    loaded: LoadedModel, sequences: Sequences, most: int = MAX_GROUP, *, new: int = 0, logits: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """`by_length`, with passes of this model that take at most `PASS_BYTES`.

    Args:
        new: tokens that will be generated after each sequence.
        logits: positions of each sequence whose logits are wanted at once.
    """
    each = token_bytes(loaded)
    # Logits lie there as the model gives them, in float32 and as log-probabilities.
    ends = -(-logits * 3 * 4 * int(loaded.model.config.get_text_config().vocab_size) // each)
    return by_length(sequences, most, tokens=max(1, PASS_BYTES // each), new=new + ends)


def token_bytes(loaded: LoadedModel) -> int:
    """About what one token of a pass takes: keys and values of every block, and the widest block while it runs."""
    config = loaded.model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1))
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    cached = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * head * len(loaded.blocks)
    inner = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return (cached + 3 * inner + 8 * int(config.hidden_size)) * loaded.model.dtype.itemsize


def prefix(loaded: LoadedModel, ids: Tensor) -> Any | None:
    """Keys and values of all but the last token of `ids` [B, S], which no edit of scope `generated` changes.

    None for a single token, and for a model whose state cannot be cut back, such as a hybrid.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if ids.shape[1] < 2:
        return None
    past = loaded.model.get_decoder()(input_ids=ids[:, :-1], use_cache=True).past_key_values
    is_plain = isinstance(past, DynamicCache) and all(type(layer) is DynamicLayer for layer in past.layers)
    return past if is_plain else None


def branch(past: Any) -> Any:
    """A cache that goes on from `past` and leaves it as it is, the tensors being shared."""
    fresh = copy.copy(past)
    fresh.layers = [copy.copy(layer) for layer in past.layers]
    return fresh
