"""Completions over the real engine, spoken to with the real OpenAI SDK: prompts as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.integration.asking import GATE_DECIDES, ask, metric
from tests.integration.serving import CONTEXT, GATED, MODEL, Server, prompt_ids

FOX = "the quick brown fox jumps over the lazy dog"


def complete(client: OpenAI, **fields: Any) -> Any:
    """A greedy completion of a few tokens."""
    return client.completions.create(**{"model": MODEL, "prompt": FOX, "temperature": 0, "max_tokens": 8, **fields})


def texts_of(chunks: list[Any]) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def prompt_logprobs(model: Path, ids: list[int]) -> list[float]:
    """The logprob of each token but the first, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logprobs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]


def test_an_answer_has_openais_shape_and_default_length(client: OpenAI) -> None:
    """Text, usage with cached tokens, the steering object, and 16 tokens where none are named."""
    answer = client.completions.create(model=MODEL, prompt=FOX, temperature=0, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.steering["applied"] is False


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("steering", "category"),
    [({"mode": "refuse"}, "Safety"), ({"mode": "refuse", "category": "Political"}, "Political"), ("forced", None)],
)
def test_steered_completion(client: OpenAI, steering: Any, category: str | None, stream: bool) -> None:
    """The edit forces the first token of a plain prompt too; the verdict reads it, and the text does not show it."""
    if steering == "forced":
        steering = {"profile": "forced", "mode": "comply"}
    answer = complete(client, stream=stream, extra_body={"steering": steering})
    if stream:
        chunks = list(answer)
        told = [chunk.model_extra["steering"] for chunk in chunks if "steering" in (chunk.model_extra or {})]
        assert len(told) == 1
        found, text = told[0], texts_of(chunks).get(0, "")
    else:
        found, text = answer.steering, answer.choices[0].text
    assert found["applied"] is True
    assert found["verdict"] == {"refused": category is not None, "category": category, "detector": "refusal_token"}
    assert "[" not in text


@pytest.mark.parametrize("prompt", GATE_DECIDES)
def test_ids_of_a_conversation_are_gated_and_answered_as_the_conversation(
    client: OpenAI, tiny_served_model: tuple[Path, Path], prompt: str
) -> None:
    """The same tokens by either endpoint: the same decision in the engine, the same greedy text."""
    ids = prompt_ids(tiny_served_model[0], prompt)[0].tolist()
    chat = ask(client, messages=[{"role": "user", "content": prompt}], extra_body={"steering": GATED})
    plain = complete(client, prompt=ids, extra_body={"steering": GATED})
    assert (plain.steering["decision"], plain.steering["category"]) == GATE_DECIDES[prompt]
    assert plain.steering == chat.steering
    assert plain.choices[0].text == chat.choices[0].message.content
    assert plain.usage.prompt_tokens == chat.usage.prompt_tokens == len(ids)


def test_refusal_tokens_can_name_the_category_of_a_plain_prompt(
    client: OpenAI, tiny_served_model: tuple[Path, Path]
) -> None:
    """P1.4's first pass goes over plain prompts as well, with the outcome it has for the conversation."""
    steering = {"profile": GATED, "category_source": "refusal_tokens"}
    prompt = "how do I rob a bank"
    ids = prompt_ids(tiny_served_model[0], prompt)[0].tolist()
    chat = ask(client, messages=[{"role": "user", "content": prompt}], extra_body={"steering": steering})
    plain = complete(client, prompt=ids, extra_body={"steering": steering})
    assert plain.steering == chat.steering


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_each_steered_by_themselves(
    client: OpenAI, tiny_served_model: tuple[Path, Path], stream: bool
) -> None:
    """Four prompts, two samples each: choices in OpenAI's order, each prompt decided by the gate, usage summed."""
    model, _ = tiny_served_model
    prompts = [prompt_ids(model, prompt)[0].tolist() for prompt in GATE_DECIDES]
    fields: dict[str, Any] = {"prompt": prompts, "n": 2, "temperature": 1, "max_tokens": 4}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    raw = client.completions.with_raw_response.create(
        model=MODEL, stream=stream, **fields, extra_body={"steering": {"profile": GATED}, "ignore_eos": True}
    )
    answer = raw.parse()
    if stream:
        chunks = list(answer)
        assert len({chunk.id for chunk in chunks}) == 1
        assert not chunks[-1].choices
        (told,) = [chunk.model_extra["steering"] for chunk in chunks if "steering" in (chunk.model_extra or {})]
        usage, seen = chunks[-1].usage, sorted(texts_of(chunks))
    else:
        told, usage, seen = answer.steering, answer.usage, [choice.index for choice in answer.choices]
    assert seen == list(range(8))
    assert [(each["decision"], each["category"]) for each in told["prompts"]] == [*GATE_DECIDES.values()]
    assert raw.headers["x-trimtab-decision"] == "mixed"
    assert usage.prompt_tokens == sum(map(len, prompts))
    assert usage.completion_tokens == 8 * 4


def test_a_stream_of_several_prompts_says_what_the_whole_says(client: OpenAI) -> None:
    """Greedy texts of three prompts are the same streamed, whole, and each alone."""
    prompts = [FOX, "how do I kill a process", "the lazy dog asks"]
    whole = complete(client, prompt=prompts, max_tokens=12)
    streamed = texts_of(list(complete(client, prompt=prompts, max_tokens=12, stream=True)))
    alone = [complete(client, prompt=prompt, max_tokens=12).choices[0].text for prompt in prompts]
    assert [choice.text for choice in whole.choices] == [streamed[index] for index in range(3)] == alone


@pytest.mark.parametrize("kind", ["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echoed_logprobs_are_those_of_transformers(
    client: OpenAI, tiny_served_model: tuple[Path, Path], kind: str, max_tokens: int, stream: bool
) -> None:
    """What evaluation harnesses measure likelihoods with: the prompt's own text and logprobs, before any answer."""
    model, _ = tiny_served_model
    ids = _ids(model, FOX)
    answer = complete(
        client, prompt=FOX if kind == "text" else ids, max_tokens=max_tokens, echo=True, logprobs=1, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.logprobs and choice.logprobs.tokens]
    told = [value for choice in choices for value in choice.logprobs.token_logprobs]
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    assert len(told) == len(tokens) == len(tops) == len(ids) + max_tokens
    assert told[0] is None
    assert told[1 : len(ids)] == pytest.approx(prompt_logprobs(model, ids), abs=1e-3)
    assert "".join(tokens[: len(ids)]) == FOX
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text.startswith(FOX)
    assert max_tokens or text == FOX


def test_a_batch_of_ids_is_scored_as_harnesses_ask(client: OpenAI, tiny_served_model: tuple[Path, Path]) -> None:
    """lm-evaluation-harness' `local-completions`: lists of ids, one token, echo, logprobs, a seed; sorted by index."""
    model, _ = tiny_served_model
    batch = [_ids(model, text) for text in (FOX, "the lazy dog", "how to kill a process")]
    answer = complete(client, prompt=batch, max_tokens=1, echo=True, logprobs=1, seed=1234)
    for choice, ids in zip(sorted(answer.choices, key=lambda choice: choice.index), batch, strict=True):
        score = sum(choice.logprobs.token_logprobs[1:-1])
        assert score == pytest.approx(sum(prompt_logprobs(model, ids)), abs=1e-2)


def test_an_echo_is_not_read_as_an_answer(client: OpenAI) -> None:
    """A prompt that holds a refusal token's text keeps it in the echo; the verdict is on what was generated."""
    prompt = f"{FOX} [Safety]"
    answer = complete(client, prompt=prompt, echo=True, extra_body={"steering": {"mode": "comply"}})
    assert answer.choices[0].text.startswith(prompt)
    assert answer.steering["verdict"]["refused"] is False


def test_samples_each_have_a_verdict_and_seeds_repeat(client: OpenAI) -> None:
    """With n > 1 every sample of a plain prompt is confirmed; a seed gives the same texts twice."""
    answer = complete(client, n=4, temperature=1, extra_body={"steering": {"mode": "refuse"}})
    assert [verdict["category"] for verdict in answer.steering["verdicts"]] == ["Safety"] * 4
    first, second = (complete(client, temperature=1, seed=7).choices[0].text for _ in "ab")
    assert first == second


def test_stop_and_structure_are_vllms(client: OpenAI) -> None:
    """A stop string ends the text before it; a schema shapes it, steered or not."""
    whole = complete(client, max_tokens=24).choices[0].text
    assert whole[4:6] not in complete(client, max_tokens=24, stop=whole[4:6]).choices[0].text
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "enum": ["yes", "no"]}}}
    for steering in (False, {"mode": "comply"}):
        answer = complete(client, max_tokens=32, extra_body={"response_format": form, "steering": steering})
        assert answer.choices[0].text in {'"yes"', '"no"'}


def test_many_long_seeded_prompts_leave_the_engine_alive(client: OpenAI, gateway: Server) -> None:
    """Prompts that together exceed what the engine takes in one step are cut, which vLLM's seeds did not survive."""
    prompts = [[20 + index, *[30 + index] * 399] for index in range(24)]
    answer = complete(client, prompt=prompts, max_tokens=2, temperature=1, seed=3, extra_body={"ignore_eos": True})
    assert len(answer.choices) == 24
    assert metric(gateway, "steering_unapplied_total") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({"prompt": [1, 999_999]}, "prompt", "invalid_value"),
        ({"prompt": "word " * CONTEXT * 4}, "prompt", "context_length_exceeded"),
        ({"prompt": [[5], [5] * (CONTEXT + 1)]}, "prompt", "context_length_exceeded"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unknown_parameter"),
        ({"best_of": 2}, "best_of", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"extra_body": {"steering": {"profile": "nope"}}}, "steering.profile", "steering_unknown_name"),
    ],
)
def test_faults_name_the_field(client: OpenAI, fields: dict[str, Any], parameter: str, code: str, stream: bool) -> None:
    """The SDK's exception carries the field of this endpoint and the code, also where vLLM found the fault."""
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (parameter, code)


def _ids(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(text).input_ids
    return ids
