"""Refusal openings: found among answers, exclusive of each other, and with the right probability."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch

from steering.errors import NotSupported
from steering.fit import openings as openings_module
from steering.fit.activations import LoadedModel, added_in_training, steered
from steering.fit.openings import (
    Opening,
    Openings,
    distinctive_openings,
    find_openings,
    refusal_log_probability,
    token_openings,
)
from steering.terms import Edit, added_direction


def _decode(ids: object) -> str:
    return str(ids)


def test_openings_are_as_specific_as_the_habit_and_absent_from_plain_answers() -> None:
    """`1 2 3` and `1 9` refuse, `5` begins most plain answers and some refusals, `7 7` is too rare."""
    harmful = [[1, 2, 3, 4 + row % 5] for row in range(60)] + [[1, 9, 20 + row] for row in range(20)]
    harmful += [[5, 6, row] for row in range(18)] + [[7, 7, 7]]
    plain = [[5, 30 + row] for row in range(80)] + [[8, row] for row in range(20)]
    found = distinctive_openings(harmful, plain, decode=_decode)
    assert [opening.tokens for opening in found] == [(1,), (5, 6)]
    assert found[0].harmful == pytest.approx(80 / 99, abs=1e-4)
    assert found[0].plain == 0.0
    # Were plain answers to begin with 1 as well, the two refusals would be told apart.
    split = distinctive_openings(harmful, [*plain, *[[1, 40 + row] for row in range(30)]], decode=_decode)
    assert [opening.tokens for opening in split] == [(1, 2, 3), (1, 9), (5, 6)]
    lists = [list(opening.tokens) for opening in split]
    assert not any(a != b and a == b[: len(a)] for a in lists for b in lists)


def test_answers_are_matched_from_their_beginning() -> None:
    """A prefix match, no more."""
    openings = Openings(refusals=(Opening(tokens=(1, 2), text="a"),), respond=None, found="")
    assert openings.of([1, 2, 3]) is not None
    assert openings.of([1, 3]) is None
    assert openings.of([0, 1, 2]) is None
    assert Openings.from_json(openings.to_json()) == openings
    assert not openings.is_tokens


def test_a_model_that_uses_its_refusal_tokens_has_those_and_one_that_does_not_is_read(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens in the vocabulary are not enough: what counts is whether answers begin with them."""
    said = {"harmful": [[tiny.categories["Political"], 40]] * 5, "plain": [[50, 51]] * 5}

    def answer(_loaded: object, sequences: list[list[int]], *, new_tokens: int) -> list[list[int]]:
        assert new_tokens > 1
        return said["harmful" if sequences == [[1]] else "plain"]

    monkeypatch.setattr(openings_module, "greedy", answer)
    found = find_openings(tiny, [[1]], [[2]])
    assert found == token_openings(tiny)
    assert found.is_tokens
    said["harmful"] = [[60, 61, 62, 63, 64, 65]] * 5
    found = find_openings(tiny, [[1]], [[2]])
    assert [opening.tokens for opening in found.refusals] == [(60, 61, 62, 63, 64)]
    assert found.respond is None
    assert "sequence" in found.found
    said["harmful"] = said["plain"]
    with pytest.raises(NotSupported, match="no refusal openings"):
        find_openings(tiny, [[1]], [[2]])


def test_openings_of_a_synthetic_model_that_always_begins_the_same_way(tiny: LoadedModel) -> None:
    """Greedy answers of a real model under an edit that makes it begin every harmful answer with one token."""
    prompts = tiny.prompts(["what is tea", "how do i tie a knot", "tea"])
    word = 77
    weight = tiny.model.get_output_embeddings().weight[word].detach()
    push = Edit(
        name="push",
        layers=(added_direction(layer=2, direction=torch.nn.functional.normalize(weight, dim=0), coefficient=1e4),),
    )
    plain = openings_module.greedy(tiny, prompts, new_tokens=3)
    pushed = openings_module.greedy(tiny, prompts, push, new_tokens=3)
    found = distinctive_openings(pushed * 4, plain * 4, decode=tiny.tokenizer.decode)
    assert [opening.tokens for opening in found] == [(word, word, word)]


def _untouched(_tail: int) -> AbstractContextManager[None]:
    return nullcontext()


def test_the_probability_of_a_refusal_is_the_sum_of_its_openings(tiny: LoadedModel) -> None:
    """Against the chain rule by hand, for openings of one and of two tokens, and with an edit on every position."""
    prompts = tiny.prompts(["what is tea", "tea"])
    pairs = Openings(
        refusals=(Opening(tokens=(40,), text=""), Opening(tokens=(41, 42), text=""), Opening(tokens=(43, 44), text="")),
        respond=None,
        found="",
    )

    def chance(ids: list[int], token: int) -> float:
        logits = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(torch.softmax(logits, dim=-1)[token])

    with torch.no_grad():
        found = refusal_log_probability(tiny, prompts, pairs, _untouched).exp()
        for row, prompt in enumerate(prompts):
            by_hand = chance(prompt, 40)
            by_hand += chance(prompt, 41) * chance([*prompt, 41], 42) + chance(prompt, 43) * chance([*prompt, 43], 44)
            assert float(found[row]) == pytest.approx(by_hand, rel=1e-4)
        direction = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
        edit = Edit(name="e", layers=(added_direction(layer=1, direction=direction, coefficient=4.0),))
        steered_found = refusal_log_probability(tiny, prompts, pairs, lambda tail: steered(tiny, edit, tail=tail))
        assert not torch.allclose(steered_found.exp(), found)


def test_a_model_without_tokens_has_no_token_openings(tiny: LoadedModel) -> None:
    """The error says why."""
    with pytest.raises(NotSupported, match="no refusal tokens"):
        token_openings(replace(tiny, categories={}, respond=None))


def test_gradients_are_those_of_the_whole_prompt(tiny: LoadedModel) -> None:
    """The tokens before the last are read once and without gradients, which changes neither value nor gradient."""
    (prompt,) = tiny.prompts(["how do i tie a knot"])
    pairs = Openings(refusals=(Opening(tokens=(7, 9, 11), text="x"),), respond=None, found="by hand")
    start = torch.linspace(-1.0, 1.0, tiny.width)
    vector = start.clone().requires_grad_()
    found = refusal_log_probability(tiny, [prompt], pairs, lambda tail: added_in_training(tiny, 1, vector, tail=tail))
    torch.autograd.backward(found.sum())
    whole = start.clone().requires_grad_()
    with added_in_training(tiny, 1, whole, tail=3):
        logits = tiny.model(input_ids=torch.tensor([[*prompt, 7, 9]]), use_cache=False).logits[0, -3:]
    wanted = torch.log_softmax(logits, dim=-1)[range(3), [7, 9, 11]].sum()
    torch.autograd.backward(wanted)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vector.grad, whole.grad, atol=1e-5, rtol=1e-4)
