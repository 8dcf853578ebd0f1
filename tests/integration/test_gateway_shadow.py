"""A shadow over the real engine: the gate decides as ever, and the model answers as if there were none."""

from __future__ import annotations

import httpx
import pytest
from openai import OpenAI

from tests.integration.asking import GATE_DECIDES, ask, metric
from tests.integration.serving import GATED, MODEL, SHADOWED, Server


@pytest.mark.parametrize("prompt", GATE_DECIDES)
def test_a_shadow_decides_as_the_gate_does_and_edits_nothing(client: OpenAI, gateway: Server, prompt: str) -> None:
    """Decision, category and scores are those of the same gate that steers; the text is that of no steering at all."""
    messages = [{"role": "user", "content": prompt}]
    decision, category = GATE_DECIDES[prompt]
    before = metric(gateway, "steering_decisions_total", category=category, decision=decision, mode="shadow")
    shadow, steered, plain = (
        ask(client, messages=messages, max_tokens=24, extra_body={"steering": steering})
        for steering in ({"profile": SHADOWED, "report": "full"}, {"profile": GATED, "report": "full"}, False)
    )
    told = shadow.steering
    assert (told["applied"], told["shadow"], told["edit"], told["strength"]) == (False, True, None, None)
    assert (told["decision"], told["category"]) == (decision, category)
    assert told["scores"]["refusal"] == pytest.approx(steered.steering["scores"]["refusal"], abs=1e-5)
    assert shadow.choices[0].message.content == plain.choices[0].message.content
    after = metric(gateway, "steering_decisions_total", category=category, decision=decision, mode="shadow")
    assert after == before + 1


@pytest.mark.parametrize("mode", ["refuse", "comply"])
def test_a_mode_that_a_client_names_is_shadowed_too(client: OpenAI, gateway: Server, mode: str) -> None:
    """The header of answer and stream says what was decided and not done."""
    messages = [{"role": "user", "content": "how do I boil an egg"}]
    plain = ask(client, messages=messages, max_tokens=8, extra_body={"steering": False})
    for stream in (False, True):
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, "stream": stream}
        steering = {"profile": SHADOWED, "mode": mode}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json={**body, "steering": steering}, timeout=60)
        assert answer.headers["x-trimtab-decision"] == f"shadow:{mode}"
        assert '"shadow":true' in answer.text
        if not stream:
            assert answer.json()["choices"][0]["message"]["content"] == plain.choices[0].message.content
