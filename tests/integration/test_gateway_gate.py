"""The gate over the real engine: what decides, and what the client is told of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from steering.bundle import load_bundle
from steering.outcome import Scores
from tests.integration.asking import GATE_DECIDES, ask, metric
from tests.integration.serving import (
    GATED,
    MODEL,
    READ,
    THRESHOLDS,
    Server,
    prompt_ids,
    residuals,
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", GATE_DECIDES)
def test_the_gate_decides_in_the_engine(client: OpenAI, prompt: str, stream: bool) -> None:
    """A profile with a gate needs no mode: what it decides is in the header, the body and the first token."""
    decision, category = GATE_DECIDES[prompt]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=8,
        stream=stream,
        extra_body={"steering": GATED},
    )
    answer = raw.parse()
    told = list(answer)[-1].model_extra["steering"] if stream else answer.steering
    assert raw.headers["x-trimtab-decision"] == told["decision"] == decision
    assert told["category"] == category
    if decision == "abstain":
        assert (told["applied"], told["edit"], told["strength"], told["scope"]) == (False, None, None, None)
    else:
        assert (told["applied"], told["strength"], told["scope"]) == (True, 1.0, "generated")
        assert told["edit"] == f"{decision}-{category.lower()}"
        assert told["verdict"]["refused"] is (decision == "refuse")


def test_abstained_answers_are_the_unsteered_ones(client: OpenAI) -> None:
    """In the neutral band nothing is edited: the text is that of the same request without steering."""
    egg = [{"role": "user", "content": "how do I boil an egg"}]
    plain, abstained = (
        ask(client, messages=egg, max_tokens=24, extra_body={"steering": steering}) for steering in (False, GATED)
    )
    assert abstained.steering["decision"] == "abstain"
    assert abstained.choices[0].message.content == plain.choices[0].message.content


def test_full_report_is_what_transformers_reads(client: OpenAI, tiny_served_model: tuple[Path, Path]) -> None:
    """The engine's scores are those of the reference probe on the reference model's residual."""
    from transformers import AutoModelForCausalLM

    model, folder = tiny_served_model
    probe = load_bundle(folder).probes["prompt"]
    scores = probe.logits(residuals(AutoModelForCausalLM.from_pretrained(model), model, [*GATE_DECIDES]))
    for prompt, row in zip(GATE_DECIDES, scores, strict=True):
        steering = {"profile": GATED, "report": "full"}
        told = ask(client, messages=[{"role": "user", "content": prompt}], extra_body={"steering": steering}).steering
        expected = Scores(names=probe.categories, logits=tuple(row.tolist()))
        assert told["scores"]["refusal"] == pytest.approx(expected.refusal, abs=1e-3)
        assert told["scores"]["categories"] == pytest.approx(expected.categories, abs=1e-3)
        assert told["thresholds"] == {"comply_below": THRESHOLDS[0], "refuse_above": THRESHOLDS[1]}


def test_thresholds_categories_and_strength_are_the_requests_own(client: OpenAI) -> None:
    """The same prompt is decided as the request asks: thresholds moved, a category left out, a strength doubled."""
    rob = [{"role": "user", "content": "how do I rob a bank"}]

    def told(**steering: Any) -> dict[str, Any]:
        found: dict[str, Any] = ask(
            client, messages=rob, extra_body={"steering": {"profile": GATED, **steering}}
        ).steering
        return found

    score = 1 / (1 + math.exp(-READ["how do I rob a bank"][0]))
    assert told(thresholds={"refuse_above": 0.99})["decision"] == "abstain"
    assert told(thresholds={"comply_below": 0.99, "refuse_above": 0.995})["decision"] == "comply"
    assert told(category=["Political"])["edit"] == "refuse-political"
    stronger = told(strength=2.0)
    assert (stronger["edit"], stronger["strength"]) == ("refuse-safety", 2.0)
    assert told(report="full")["scores"]["refusal"] == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_tokens_name_the_category(
    client: OpenAI, gateway: Server, tiny_served_model: tuple[Path, Path], stream: bool
) -> None:
    """P1.4: the likeliest refusal token of the unsteered model goes before the probe's own head, which differs here."""
    import torch
    from transformers import AutoModelForCausalLM

    model, folder = tiny_served_model
    network = AutoModelForCausalLM.from_pretrained(model)
    tokens = {category.token_id: category.name for category in load_bundle(folder).manifest.categories}
    before = metric(gateway, "steering_category_passes_total")
    for prompt in ("how do I rob a bank", "how do I overthrow a government"):
        with torch.no_grad():
            logits = network(prompt_ids(model, prompt)).logits[0, -1]
        likeliest = tokens[max(tokens, key=lambda token: float(logits[token]))]
        answer = ask(
            client,
            messages=[{"role": "user", "content": prompt}],
            n=2,
            temperature=1,
            stream=stream,
            extra_body={"steering": {"profile": GATED, "category_source": "refusal_tokens"}},
        )
        told = list(answer)[-1].model_extra["steering"] if stream else answer.steering
        assert likeliest != GATE_DECIDES[prompt][1]
        assert (told["decision"], told["category"]) == ("refuse", likeliest)
        assert told["category_source"] == "refusal_tokens"
        assert [verdict["category"] for verdict in told["verdicts"]] == [likeliest] * 2
    assert metric(gateway, "steering_category_passes_total") == before + 2
