"""Residuals are those of block outputs, and hooks edit exactly the positions and layers of the edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steering.errors import NotSupported, OperatorError
from steering.fit.activations import (
    LoadedModel,
    first_logits,
    greedy,
    last_residuals,
    load_model,
    require_tokens,
    steered,
)
from steering.fit.categories import CATEGORIES, SAFETY
from steering.fit.outcomes import Outcomes, decide
from steering.terms import Edit, ablated_direction, added_direction

PROMPTS = ("what is tea", "how do i tie a knot at home?", "tea", "what is tie")


def _edit(layer: int, coefficient: float) -> Edit:
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    return Edit(name="e", layers=(added_direction(layer=layer, direction=direction, coefficient=coefficient),))


def test_residuals_are_block_outputs_at_the_last_token(tiny: LoadedModel) -> None:
    """Equal to transformers' own hidden states, one prompt at a time, for every block but the normed last one."""
    prompts = tiny.prompts(PROMPTS)
    found = last_residuals(tiny, prompts)
    assert found.shape == (4, 3, 16)
    for row, prompt in enumerate(prompts):
        states = tiny.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in range(2):
            torch.testing.assert_close(found[row, layer], states[layer + 1][0, -1].detach(), atol=1e-5, rtol=1e-5)
    normed = tiny.model.get_decoder().norm(found[:, 2])
    last = torch.stack(
        [
            tiny.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            for ids in prompts
        ]
    )
    torch.testing.assert_close(normed, last, atol=1e-5, rtol=1e-5)


def test_the_chat_prompt_ends_in_the_assistant_header(tiny: LoadedModel) -> None:
    """The next token is the decision, and the text begins with one BOS."""
    ids = tiny.prompt("tea")
    assert ids[0] == tiny.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1
    assert tiny.tokenizer.convert_ids_to_tokens(ids[-1:]) == ["<|assistant|>"]


def test_an_edit_changes_its_layer_by_exactly_the_vector_and_only_the_last_position(tiny: LoadedModel) -> None:
    """Earlier layers and earlier positions are bit-identical; the edited one differs by coefficient times direction."""
    prompt = tiny.prompts(PROMPTS[:1])
    before = last_residuals(tiny, prompt)
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen["output"] = output.detach().clone()

    with steered(tiny, _edit(1, 3.0), 0.5):
        handle = tiny.blocks[1].register_forward_hook(keep)
        tiny.model(input_ids=torch.tensor(prompt))
        handle.remove()
    plain = tiny.model(input_ids=torch.tensor(prompt), output_hidden_states=True).hidden_states[2]
    assert torch.equal(seen["output"][0, :-1], plain[0, :-1])
    added = seen["output"][0, -1] - before[0, 1]
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    torch.testing.assert_close(added, 1.5 * direction, atol=1e-5, rtol=1e-4)


def test_hooks_are_gone_after_use_and_strength_zero_changes_nothing(tiny: LoadedModel) -> None:
    """A steered pass leaves no trace, also when it raises inside."""
    prompts = tiny.prompts(PROMPTS)
    plain = first_logits(tiny, prompts)
    with pytest.raises(RuntimeError, match="inside"), steered(tiny, _edit(0, 50.0)):
        raise RuntimeError("inside")
    assert torch.equal(first_logits(tiny, prompts), plain)
    assert torch.equal(first_logits(tiny, prompts, _edit(0, 50.0), 0.0), plain)
    assert not torch.allclose(first_logits(tiny, prompts, _edit(0, 50.0)), plain)


def test_generation_edits_the_last_prompt_token_and_every_generated_one(tiny: LoadedModel) -> None:
    """Cached generation equals recomputing each prefix with every position from the last prompt token on edited."""
    prompt = tiny.prompts(PROMPTS[:1])[0]
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    edit = Edit(name="a", layers=(ablated_direction(layer=1, direction=direction),))
    found = greedy(tiny, [prompt], edit, new_tokens=6)[0]

    def everywhere(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        edited = output.clone()
        tail = edited[:, len(prompt) - 1 :]
        edited[:, len(prompt) - 1 :] = tail - (tail @ direction).unsqueeze(-1) * direction
        return edited

    handle = tiny.blocks[1].register_forward_hook(everywhere)
    ids = list(prompt)
    for _ in range(len(found)):
        ids.append(int(tiny.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    handle.remove()
    assert ids[len(prompt) :] == found


def test_a_batch_of_unequal_prompts_gives_each_the_answer_it_gets_alone(tiny: LoadedModel) -> None:
    """Grouping by length changes nothing and keeps the order."""
    prompts = tiny.prompts(PROMPTS)
    together = greedy(tiny, prompts, _edit(1, 4.0), new_tokens=5)
    assert together == [greedy(tiny, [prompt], _edit(1, 4.0), new_tokens=5)[0] for prompt in prompts]


def test_decisions_are_read_from_first_tokens(tiny: LoadedModel) -> None:
    """An edit of the last block along the embedding of `[Political]` makes every prompt refused as political."""
    political = tiny.categories["Political"]
    weight = tiny.model.get_output_embeddings().weight[political].detach()
    push = Edit(
        name="push",
        layers=(added_direction(layer=2, direction=torch.nn.functional.normalize(weight, dim=0), coefficient=1e4),),
    )
    outcomes = decide(tiny, tiny.prompts(PROMPTS), push)
    assert outcomes.refused == ("Political",) * 4
    assert outcomes.refusals.value == 1.0
    assert outcomes.agreement(["Political", "Political", SAFETY, "Political"]).count == 3


def test_a_prompt_that_is_neither_refused_nor_answered_is_malformed() -> None:
    """The three outcomes exclude each other and are counted apart."""
    outcomes = Outcomes(refused=(SAFETY, None, None), answered=(False, True, False))
    assert (outcomes.refusals.count, outcomes.malformed.count) == (1, 1)
    assert outcomes.categories() == {SAFETY: 1}


def test_a_model_without_the_tokens_is_refused_by_name(tiny: LoadedModel, tmp_path: Path) -> None:
    """Categorical directions need the tokens; the message names those that are missing."""
    assert require_tokens(tiny, CATEGORIES) == tiny.respond
    with pytest.raises(NotSupported, match=r"\[Weather\]"):
        require_tokens(tiny, (*CATEGORIES, "Weather"))
    with pytest.raises(OperatorError, match=r"config\.json is missing"):
        load_model(tmp_path)


def test_a_model_spread_by_a_device_map_gives_the_same_residuals_and_answers(tiny: LoadedModel) -> None:
    """Under accelerate's map, here with one device to choose from, residuals and greedy answers are bit for bit those
    of the model loaded whole.
    """
    spread = load_model(tiny.path, CATEGORIES, device_map="auto")
    prompts = tiny.prompts(["How are you?", "Tell me about the sea."])
    assert torch.equal(last_residuals(spread, prompts), last_residuals(tiny, prompts))
    assert greedy(spread, prompts, new_tokens=6) == greedy(tiny, prompts, new_tokens=6)


def test_a_device_map_that_is_none_is_refused_with_what_is_possible(tiny: LoadedModel) -> None:
    """A misspelt map is an error for the operator that names the known ones."""
    with pytest.raises(OperatorError, match=r"(?s)device_map 'everywhere'.*auto"):
        load_model(tiny.path, CATEGORIES, device_map="everywhere")
