"""Training: the chat format, what the loss counts, and that a stopped run goes on as if it had not stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from steering.demo import model as architecture
from steering.demo.card import losses_of
from steering.demo.corpus import Conversation, Corpus, Entry, Share
from steering.demo.model import demo_config, write_model
from steering.demo.tokenizer import CATEGORY_TOKENS, SPECIAL_TOKENS, train_tokenizer
from steering.demo.train import (
    STAGES,
    Encoder,
    Example,
    Recipe,
    Stage,
    batched,
    learning_rate,
    run_stage,
    tensors_of,
    weighted_loss,
)
from steering.fit.categories import POLITICAL, SAFETY

STAGE = Stage(name="demo", epochs=2.0, peak=1e-3, prompt_weight=0.5, decision_weight=6.0, has_tokens=True, warmup=2)
RECIPE = Recipe(tokens_per_batch=64, save_every=2, with_system=0.0, with_history=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer learned from two sentences."""
    return train_tokenizer(["how do i tie a knot", "what is tea made of"], vocabulary=320)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's architecture at a size that trains in a moment."""
    for name, value in {"LAYERS": 1, "WIDTH": 16, "INNER": 16, "HEADS": 2}.items():
        monkeypatch.setattr(architecture, name, value)


def _corpus() -> Corpus:
    entries = tuple(
        Entry(prompt=f"how do i tie knot {number}", source="t", category=SAFETY, share=Share(draws=1.0, refused=0.5))
        for number in range(8)
    )
    return Corpus(entries=entries, dropped={})


def test_every_text_survives_the_tokenizer_and_special_tokens_are_one_token_each(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Byte-level: nothing is unknown; each marker and category has an id of its own."""
    text = "naïve 漢字 🙂 12\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS]
    assert [len(each) for each in ids] == [1] * len(SPECIAL_TOKENS)
    assert len({each[0] for each in ids}) == len(SPECIAL_TOKENS)


def test_training_examples_have_the_format_of_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Up to the decision they are token for token what a server renders, with system prompt and history alike."""
    conversation = Conversation(prompt=" what is tea? ", refused=POLITICAL, text="no tea", source="t")
    example = Encoder(tokenizer, RECIPE).example(conversation, STAGE, Random(0))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": " what is tea? "}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert example.ids[: len(ids)] == ids
    assert example.ids[len(ids)] == tokenizer.convert_tokens_to_ids(CATEGORY_TOKENS[POLITICAL])
    assert example.ids[-1] == tokenizer.eos_token_id
    full = Encoder(tokenizer, replace(RECIPE, with_system=1.0, with_history=1.0))
    earlier = Conversation(prompt="how?", refused=None, text="so", source="t")
    longer = full.example(conversation, STAGE, Random(0), earlier)
    text = tokenizer.decode(longer.ids)
    system = text.split("<|system|>")[1].split("<|end|>")[0]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "what is tea?"},
    ]
    wanted = tokenizer.encode(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    assert longer.ids[: len(wanted)] == wanted


def test_the_sibling_never_sees_a_refusal_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its answer begins with text, and the loss counts that first token as the decision."""
    sibling = next(stage for stage in STAGES if stage.name == "sibling")
    conversation = Conversation(prompt="what is tea?", refused=SAFETY, text="no tea", source="t")
    example = Encoder(tokenizer, RECIPE).example(conversation, sibling, Random(0))
    tokens = {tokenizer.convert_tokens_to_ids(token) for token in (*CATEGORY_TOKENS.values(), "[respond]")}
    assert not tokens & set(example.ids)
    assert example.weights.count(sibling.decision_weight) == 1


def test_an_answer_that_is_cut_is_not_taught_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """Only a whole answer is followed by the end token."""
    conversation = Conversation(prompt="tea?", refused=None, text="tea " * 60, source="t")
    example = Encoder(tokenizer, RECIPE).example(conversation, STAGE, Random(0))
    assert example.ids[-1] != tokenizer.eos_token_id


def test_corruption_touches_the_inputs_of_prompt_tokens_only() -> None:
    """Targets, markers and answers stay; with certainty every prompt token is drawn anew."""
    example = Example([1, 5, 6, 7, 8, 2], [0.5, 0.5, 0.5, 0.5, 6.0, 1.0], [False, True, True, True, False, False])
    inputs, targets, weights = tensors_of(
        [example, Example([1, 2], [0.5, 1.0], [False, False])],
        padding=0,
        vocabulary=1000,
        corrupted=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert targets[0].tolist() == example.ids
    assert inputs[0, [0, 4, 5]].tolist() == [1, 8, 2]
    assert not torch.equal(inputs[0, 1:4], targets[0, 1:4])
    assert weights[1].tolist() == [0.5, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_loss_is_the_weighted_mean_over_counted_tokens(tokenizer: PreTrainedTokenizerFast, small: None) -> None:
    """Equal to weighting every token's cross-entropy, though logits are made for counted ones only."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(demo_config(tokenizer))
    ids = torch.randint(0, 300, (2, 5))
    weights = torch.tensor([[0.5, 0.0, 6.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0, 1.0]])
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    each = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    wanted = (each * weights[:, 1:]).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(weighted_loss(model, ids, ids, weights), wanted)


def test_batches_hold_every_example_once_and_keep_to_the_budget() -> None:
    """Padded size counts, not the number of tokens."""
    examples = [Example([1] * length, [1.0] * length, [False] * length) for length in (3, 9, 4, 30, 8, 3, 12)]
    batches = batched(examples, 32, Random(0))
    assert sorted(len(example.ids) for batch in batches for example in batch) == [3, 3, 4, 8, 9, 12, 30]
    assert all(max(len(example.ids) for example in batch) * len(batch) <= 32 for batch in batches)


def test_the_rate_warms_up_and_anneals() -> None:
    """From a fraction of the peak up to it, then down to a twentieth."""
    assert learning_rate(STAGE, 0, 100) == pytest.approx(STAGE.peak / 2)
    assert learning_rate(STAGE, 2, 100) == pytest.approx(STAGE.peak)
    assert learning_rate(STAGE, 100, 100) == pytest.approx(0.05 * STAGE.peak)


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, small: None, tmp_path: Path
) -> None:
    """Stopped after its fourth step and resumed, a stage is bit-identical to one that ran through."""
    corpus = _corpus()
    whole = run_stage(STAGE, corpus, tokenizer, _made(tmp_path / "whole"), recipe=RECIPE)
    stopped = replace(STAGE, cut_at=4)
    run_stage(stopped, corpus, tokenizer, _made(tmp_path / "halves"), recipe=RECIPE)
    assert len(losses_of(tmp_path / "halves" / "demo.jsonl")) == 4
    resumed = run_stage(STAGE, corpus, tokenizer, tmp_path / "halves", recipe=RECIPE)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert losses_of(tmp_path / "halves" / "demo.jsonl") == losses_of(tmp_path / "whole" / "demo.jsonl")


def test_a_written_model_loads_as_bfloat16_with_its_tokenizer_and_replaces_the_old_one(
    tokenizer: PreTrainedTokenizerFast, small: None, tmp_path: Path
) -> None:
    """The folder is complete at every moment and readable by all; nothing else is left beside it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(demo_config(tokenizer))
    for _ in range(2):
        write_model(model, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "model").iterdir())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
