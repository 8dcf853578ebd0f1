"""What an evaluation computes through transformers: CAST's mean residuals, and the loss of reference answers."""

from __future__ import annotations

import pytest
import torch

from steering.evaluate.cast import Condition, fires, mean_residuals, similarity
from steering.evaluate.journal import Answer
from steering.evaluate.reference_loss import loss_change
from steering.evaluate.run import Asked
from steering.evaluate.suites import SUITES
from steering.evaluate.tally import Row
from steering.fit.activations import LoadedModel, steered
from steering.fit.datasets import Record
from steering.fit.sources import Label
from steering.terms import Edit, LayerTerms

PROMPTS = ("how do i tie a knot", "what is tea made of", "tea", "how is tea made")


def record(prompt: str, answer: str | None = None) -> Record:
    """A prompt as the registry hands it out."""
    return Record(key=prompt, dataset="gsm8k", part="test", prompt=prompt, label=Label.BENIGN, answer=answer)


def adding(layer: int, size: float) -> Edit:
    """An edit that adds `size` along the first axis."""
    axis = torch.zeros(1, 16)
    axis[0, 0] = 1.0
    terms = LayerTerms(layer=layer, read=axis, write=axis, gain=torch.zeros(1), bias=torch.tensor([size]))
    return Edit(name="push", layers=(terms,))


def row(prompt: str, answer: str, edit: str | None) -> Row:
    """A served answer under auto to a prompt with a reference answer."""
    served = Answer(text="x", decision="comply" if edit else "abstain", edit=edit, strength=1.0 if edit else None)
    asked = Asked(suite=SUITES["gsm8k"], arm="auto", record=record(prompt, answer), answer=served)
    return Row(asked=asked, verdicts={})


def test_mean_residuals_are_means_over_all_tokens(tiny: LoadedModel) -> None:
    """Against transformers' own hidden states, prompt by prompt, at every layer but the last, which it normalises."""
    sequences = tiny.prompts(PROMPTS)
    found = mean_residuals(tiny, sequences)
    for place, ids in enumerate(sequences):
        states = tiny.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in range(len(tiny.blocks) - 1):
            torch.testing.assert_close(found[place, layer], states[layer + 1][0].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_condition_fires_on_its_side_of_the_threshold_and_leaves_out_long_prompts(tiny: LoadedModel) -> None:
    """Both sides split the prompts between them; a prompt too long for the served context is not judged."""
    records = [record(prompt) for prompt in PROMPTS]
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    values = similarity(mean_residuals(tiny, tiny.prompts(PROMPTS))[:, 1], direction)
    cut = float(values.median())
    sides = [
        fires(
            tiny,
            Condition(
                layer=1, direction=direction, threshold=cut, is_above=is_above, is_signed=False, f1=0.0, fitted=0
            ),
            records,
            None,
        )
        for is_above in (True, False)
    ]
    assert {key: not flag for key, flag in sides[0].items()} == sides[1]
    assert sum(sides[0].values()) == 3, "the median itself is at or above"
    longest = len(tiny.prompt("tea"))
    condition = Condition(layer=1, direction=direction, threshold=cut, is_above=True, is_signed=False, f1=0.0, fitted=0)
    assert set(fires(tiny, condition, records, longest)) == {"tea"}


def test_reference_loss_changes_only_where_the_gate_chose_an_edit(tiny: LoadedModel) -> None:
    """The edited loss is that of a model whose positions from the last prompt token on are edited, others untouched."""
    edit = adding(1, 3.0)
    plain = loss_change(tiny, {"push": edit}, [row(PROMPTS[0], "made of tea", None)], 100)
    assert plain["change"]["mean"] == 0.0
    assert plain["change_where_edited"] is None
    both = [row(PROMPTS[0], "made of tea", "push"), row(PROMPTS[0], "made of tea", None)]
    told = loss_change(tiny, {"push": edit}, both, 100)
    assert told["change"]["n"] == 2
    assert told["change_where_edited"]["mean"] == pytest.approx(2 * told["change"]["mean"], abs=1e-4)
    assert abs(told["change"]["mean"]) > 1e-3

    # Token by token: at each step only the last position is edited, earlier answer positions were when they were last.
    prompt = tiny.prompt(PROMPTS[0])
    assert tiny.respond is not None
    text = tiny.tokenizer.encode("made of tea", add_special_tokens=False)
    ids = [*prompt, tiny.respond, *text]
    losses = []
    state = None
    with steered(tiny, edit), torch.inference_mode():
        for end in range(len(prompt), len(ids)):
            given = torch.tensor([ids[:end] if state is None else ids[end - 1 : end]])
            output = tiny.model(input_ids=given, past_key_values=state, use_cache=True)
            state = output.past_key_values
            if end > len(prompt):
                losses.append(-float(output.logits[0, -1].log_softmax(dim=-1)[ids[end]]))
    wanted = sum(losses) / len(losses) - plain["unsteered"]["mean"]
    assert told["change_where_edited"]["mean"] == pytest.approx(wanted, abs=1e-3)


def test_reference_answers_that_do_not_fit_are_left_out(tiny: LoadedModel) -> None:
    """Nothing of the answer within the context gives no number at all."""
    assert loss_change(tiny, {}, [row(PROMPTS[0], "made of tea", None)], 3) == {}
