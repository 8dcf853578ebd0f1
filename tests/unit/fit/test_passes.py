"""Passes: groups of one length that fit in memory, and prefixes that are shared and left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steering.fit import passes as passes_module
from steering.fit.activations import LoadedModel, greedy, last_residuals_and_tokens
from steering.fit.passes import PASS_BYTES, branch, by_length, passes, prefix, token_bytes


class Shape:
    """As much of a model as the size of its passes depends on."""

    def __init__(self, *, layers: int, dtype: torch.dtype, **config: Any) -> None:
        self.blocks = range(layers)
        self.dtype = dtype
        self.config = type("Config", (), config)
        self.model = self

    def get_text_config(self) -> Any:
        """Of `config.get_text_config()`."""
        return self.config


def _llama_8b(dtype: torch.dtype) -> Any:
    shape = Shape(
        layers=32,
        dtype=dtype,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    shape.config.get_text_config = staticmethod(lambda: shape.config)
    return shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("new", "logits"), [(0, 0), (48, 1), (0, 25)])
def test_a_pass_of_an_8b_model_takes_what_it_may(dtype: torch.dtype, new: int, logits: int) -> None:
    """Keys, values, the widest block, tokens to come and logits of a real vocabulary; every sequence is in one."""
    loaded = _llama_8b(dtype)
    sequences = [[0] * (5 + index % 120) for index in range(600)]
    seen: list[int] = []
    for indices, ids in passes(loaded, sequences, new=new, logits=logits):
        seen += indices
        taken = ids.numel() * token_bytes(loaded) + len(indices) * (new * token_bytes(loaded) + logits * 128256 * 4 * 3)
        assert taken <= PASS_BYTES
    assert sorted(seen) == list(range(600))


def test_a_sequence_longer_than_a_pass_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no smaller pass than one sequence."""
    monkeypatch.setattr(passes_module, "PASS_BYTES", 1)
    assert [indices for indices, _ in passes(_llama_8b(torch.float32), [[1, 2], [3, 4], [5]])] == [[2], [0], [1]]


def test_small_models_keep_their_groups(tiny: LoadedModel) -> None:
    """Where memory is no question sequences are grouped by length and number alone."""
    sequences = [[1] * (1 + index % 3) for index in range(200)]
    assert [found[0] for found in passes(tiny, sequences, logits=1)] == [found[0] for found in by_length(sequences)]


def test_small_passes_give_what_large_ones_give(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals, first tokens and answers do not depend on how many sequences run together."""
    prompts = tiny.prompts(["what is tea", "how do i tie a knot at home?", "what is tie", "what is how"])
    residuals, tokens = last_residuals_and_tokens(tiny, prompts)
    answers = greedy(tiny, prompts, new_tokens=4)
    monkeypatch.setattr(passes_module, "PASS_BYTES", 1)
    alone, firsts = last_residuals_and_tokens(tiny, prompts)
    torch.testing.assert_close(alone, residuals, atol=1e-5, rtol=1e-5)
    assert firsts.tolist() == tokens.tolist() == [answer[0] for answer in answers]
    assert greedy(tiny, prompts, new_tokens=4) == answers


def test_what_is_kept_of_a_pass_does_not_hold_all_its_positions(tiny: LoadedModel) -> None:
    """The last position of each block is copied: a view would keep every position of every block in memory."""
    kept: list[torch.Tensor] = []
    prompts = tiny.prompts(["how do i tie a knot at home?"])
    original = torch.Tensor.to

    def watched(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if arguments[:1] == ("cpu",):
            kept.append(self)
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", watched)
        last_residuals_and_tokens(tiny, prompts)
    assert len(kept) == len(tiny.blocks)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in kept)


def test_a_branch_leaves_its_prefix_as_it_is(tiny: LoadedModel) -> None:
    """Two continuations of one prefix are those of the whole sequences, and gradients do not reach the prefix."""
    ids = torch.tensor(tiny.prompts(["what is tea made of"]))
    with torch.no_grad():
        past = prefix(tiny, ids)
    assert past is not None
    for last in (ids[:, -1:], ids[:, :1]):
        got = tiny.model(input_ids=last, past_key_values=branch(past), use_cache=True).logits[:, -1]
        whole = tiny.model(input_ids=torch.cat([ids[:, :-1], last], dim=1), use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    assert past.get_seq_length() == ids.shape[1] - 1
    assert prefix(tiny, ids[:, :1]) is None, "a single token has none"
