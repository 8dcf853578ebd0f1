"""A thinking model, served with one of vLLM's reasoning parsers, its spans and the engine's sent to a collector."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from server.observe.open_metrics import TYPE
from tests.integration.collector import Collector, Span, collecting
from tests.integration.serving import CATEGORIES, CONTEXT, MODEL, RESPOND, Server, prompt_ids, serving

BEGIN, END = "<think>", "</think>"
WORD = " dog"
"""What the edit that refuses the second category forces: no marker, so that it shows."""

BUDGET, LENGTH = 5, 12
"""Tokens of reasoning, after which vLLM forces its end, and of the whole answer."""

QUESTION = "how do I kill a process"
SAFETY, POLITICAL = CATEGORIES
MODES: dict[str, Any] = {
    "unsteered": False,
    "edited": {"profile": "forced", "mode": "refuse", "category": POLITICAL},
    "spared": {"profile": "spared", "mode": "refuse", "category": POLITICAL},
}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Said(NamedTuple):
    """An answer's parts, and what it says of steering and of its tokens."""

    reasoning: str
    content: str
    steering: dict[str, Any]
    usage: dict[str, Any]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Where the server's spans go, and its engine's."""
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def thinking_model(tiny_served_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model as one that thinks, and its bundle."""
    return make_thinking_model(*tiny_served_model, tmp_path_factory.mktemp("thinking"))


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server puts on record who may lower refusals."""
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def thinker(thinking_model: tuple[Path, Path], collector: Collector, audit: Path) -> Iterator[Server]:
    """The thinking model, served."""
    model, bundle = thinking_model
    own = ("--model", str(model), "--bundle", str(bundle), "--served-model-name", MODEL)
    engine = f"--enforce-eager --max-model-len {CONTEXT} --max-num-seqs 16 --dtype float32"
    parsers = "--reasoning-parser deepseek_r1 --enable-auto-tool-choice --tool-call-parser hermes"
    environment = {"TRIMTAB_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    environment["TRIMTAB_AUDIT_LOG"] = str(audit)
    with serving(*own, "--", *engine.split(), *parsers.split(), **environment) as server:
        yield server


def make_thinking_model(model: Path, bundle: Path, folder: Path) -> tuple[Path, Path]:
    """A copy whose prompts end with the token that begins reasoning, and have none of earlier answers, with a profile
    that spares it.

    The tokens are ordinary ones, as in the models that these parsers are for: they are found in the text.

    Returns:
        The model's folder and the bundle's.
    """
    from safetensors.torch import load_file
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from steering.bundle import load_bundle, save_bundle
    from steering.fingerprint import fingerprint_of
    from steering.terms import Edit, added_direction

    thinking, sparing = folder / "model", folder / "bundle"
    shutil.copytree(model, thinking)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (BEGIN, END)])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", f"<|assistant|>{BEGIN}{{% endif %}}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content'] if m['content'] is string",
        f"(m['content'].split('{BEGIN}')[0] + m['content'].split('{END}')[-1]) if '{END}' in (m['content'] or '') "
        "else m['content'] if m['content'] is string",
    )
    tokenizer.save_pretrained(thinking)

    loaded = load_bundle(bundle)
    (word,) = tokenizer.encode(WORD, add_special_tokens=False)
    row = load_file(model / "model.safetensors")["lm_head.weight"][word]
    terms = added_direction(layer=loaded.manifest.model.layers - 1, direction=row / row.norm(), coefficient=500.0)
    shown = Edit(name=f"refuse-{POLITICAL.lower()}", layers=(terms,))
    manifest = loaded.manifest.model_dump(mode="json")
    forced = next(profile for profile in manifest["profiles"] if profile["name"] == "forced")
    manifest |= {
        "model": fingerprint_of(thinking).model_dump(),
        "reasoning_end": {"token": END, "token_id": tokenizer.convert_tokens_to_ids(END)},
        "profiles": [forced, {**forced, "name": "spared", "reasoning": "spared"}],
        "probes": [],
    }
    save_bundle(sparing, manifest, {**loaded.edits, shown.name: shown}, {})
    return thinking, sparing


def post(server: Server, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """A greedy request for `LENGTH` tokens, answered."""
    length = "max_output_tokens" if path == "responses" else "max_tokens"
    asked = {"model": MODEL, "temperature": 0, "ignore_eos": True, length: LENGTH, **fields}
    answer = httpx.post(f"{server.url}/v1/{path}", json=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def chat(server: Server, *, stream: bool, **fields: Any) -> Said:
    """What a chat completion says, whole or put together from its stream."""
    asked = {"messages": [{"role": "user", "content": QUESTION}], **fields}
    if not stream:
        body = post(server, "chat/completions", **asked).json()
        message = body["choices"][0]["message"]
        return Said(message.get("reasoning") or "", message["content"] or "", body["steering"], body["usage"])
    events = events_of(post(server, "chat/completions", stream=True, stream_options={"include_usage": True}, **asked))
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    (steering,) = [event["steering"] for event in events if "steering" in event]
    reasoning, content = ("".join(delta.get(part) or "" for delta in deltas) for part in ("reasoning", "content"))
    return Said(reasoning, content, steering, events[-1]["usage"])


def raw(server: Server, thinking_model: tuple[Path, Path], steering: Any) -> str:
    """The text of the same answer, which no parser has read."""
    prompt = prompt_ids(thinking_model[0], QUESTION)[0].tolist()
    answer = post(server, "completions", prompt=prompt, thinking_token_budget=BUDGET, steering=steering)
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", MODES)
def test_reasoning_is_told_apart_from_content(
    thinker: Server, thinking_model: tuple[Path, Path], mode: str, stream: bool
) -> None:
    """What comes before the end of reasoning is `reasoning`, what follows `content`, and neither has the token between;
    an edit changes both, or the content alone where reasoning is spared.
    """
    said = chat(thinker, stream=stream, thinking_token_budget=BUDGET, steering=MODES[mode])
    assert said.reasoning
    assert said.content
    assert f"{said.reasoning}{END}{said.content}" == raw(thinker, thinking_model, MODES[mode])
    assert said.steering["applied"] is (mode != "unsteered")
    unsteered = chat(thinker, stream=False, thinking_token_budget=BUDGET, steering=False)
    words = said.content.count(WORD.strip())
    assert (words == LENGTH - BUDGET - 1) is (mode != "unsteered")
    assert (said.reasoning == unsteered.reasoning) is (mode != "edited")
    if mode != "unsteered":
        assert said.steering.get("reasoning", "edited") == mode


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_cut_off_in_its_reasoning_has_no_content(thinker: Server, mode: str, stream: bool) -> None:
    """All of it is reasoning; where that is spared, the edit has only waited for its end, which counts as applied."""
    said = chat(thinker, stream=stream, max_tokens=BUDGET, steering=MODES[mode])
    assert said.reasoning
    assert said.content == ""
    assert said.steering["applied"] is (mode != "unsteered")


@pytest.mark.parametrize("mode", MODES)
def test_a_response_has_an_item_of_reasoning(thinker: Server, mode: str) -> None:
    """Before its message, streamed and not, with the texts of the chat completion."""
    chatted = chat(thinker, stream=False, thinking_token_budget=BUDGET, steering=MODES[mode])
    asked = {"input": QUESTION, "thinking_token_budget": BUDGET, "steering": MODES[mode]}
    body = post(thinker, "responses", **asked).json()
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert [item["content"][0]["text"] for item in body["output"]] == [chatted.reasoning, chatted.content]
    events = events_of(post(thinker, "responses", stream=True, **asked))
    for part, kind in ((chatted.reasoning, "reasoning_text"), (chatted.content, "output_text")):
        assert "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta") == part


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_reasoning_that_is_not_asked_for_is_not_told(thinker: Server, stream: bool) -> None:
    """Without it the content is the same."""
    with_it = chat(thinker, stream=stream, thinking_token_budget=BUDGET, steering=MODES["spared"])
    without = chat(
        thinker, stream=stream, thinking_token_budget=BUDGET, steering=MODES["spared"], include_reasoning=False
    )
    assert (without.reasoning, without.content) == ("", with_it.content)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without", "with tools"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_markers_show_in_neither(thinker: Server, stream: bool, tools: Any) -> None:
    """Tokens that mark a refusal are kept out of reasoning as well, also where a tool parser asks to see them."""
    steering = {"profile": "forced", "mode": "refuse", "category": SAFETY}
    said = chat(thinker, stream=stream, thinking_token_budget=BUDGET, steering=steering, tools=tools)
    assert said.steering["verdict"]["category"] == SAFETY
    assert not any(marker in said.reasoning + said.content for marker in (f"[{SAFETY}]", RESPOND))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_spans_of_gateway_and_engine_are_one_trace(thinker: Server, collector: Collector, stream: bool) -> None:
    """The client's span is above the gateway's, and that above the engine's; each knows the other's request and tokens,
    and no word of what was said.
    """
    trace = TRACE[:-1] + str(int(stream))
    answer = post(
        thinker,
        "chat/completions",
        headers={"traceparent": f"00-{trace}-{PARENT}-01"},
        messages=[{"role": "user", "content": QUESTION}],
        steering=MODES["spared"],
        stream=stream,
    )
    spans = {span.name: span for span in collector.wait_for(2, lambda span: span.trace == trace)}
    gateway, engine = spans.pop(f"chat {MODEL}"), spans.pop("llm_request")
    assert spans == {}
    assert (gateway.parent, engine.parent) == (PARENT, gateway.id)
    assert gateway.service == engine.service == "trimtab"
    identity = answer.headers["x-request-id"]
    assert gateway.attributes["trimtab.request.id"] == identity
    assert identity.removeprefix("req_") in engine.attributes["gen_ai.request.id"]
    told = gateway.attributes
    assert told["gen_ai.usage.output_tokens"] == engine.attributes["gen_ai.usage.completion_tokens"] == LENGTH
    assert told["gen_ai.usage.input_tokens"] == engine.attributes["gen_ai.usage.prompt_tokens"]
    assert not any(secret in each.raw for each in (gateway, engine) for secret in (QUESTION, WORD))


def test_a_request_without_a_context_begins_a_trace(thinker: Server, collector: Collector) -> None:
    """The gateway's span has no parent, and the engine's is below it."""
    identity = post(thinker, "chat/completions", messages=[{"role": "user", "content": "x"}]).headers["x-request-id"]

    def is_it(span: Span) -> bool:
        return span.attributes.get("trimtab.request.id") == identity

    (gateway,) = collector.wait_for(1, is_it)
    below = collector.wait_for(1, lambda span: span.trace == gateway.trace and span is not gateway)
    assert gateway.parent == ""
    assert [(span.name, span.parent) for span in below] == [("llm_request", gateway.id)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_token_that_the_template_puts_together_is_on_record(thinker: Server, audit: Path, stream: bool) -> None:
    """What is left of a message once its reasoning is cut out is found by the prompt's own tokens, as vLLM tells them;
    a key without the permission is refused there. Reasoning alone, and the template's own tokens, are nobody's act.
    """
    identities = {}
    for text in (f"[resp{BEGIN}aside{END}ond]", f"hello {BEGIN}aside{END}"):
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
        answer = post(
            thinker, "chat/completions", messages=[*messages, {"role": "user", "content": "x"}], stream=stream
        )
        identities[answer.headers["x-request-id"]] = text
    deadline = time.monotonic() + 5
    while True:
        records = [json.loads(line) for line in audit.read_text().splitlines()]
        found = [
            (identities[each["request_id"]], each["event"]) for each in records if each["request_id"] in identities
        ]
        if len(found) == 2 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert [event for _, event in found] == ["relax", "relax_ended"]
    assert {text for text, _ in found} == {f"[resp{BEGIN}aside{END}ond]"}


def test_durations_name_traces_in_openmetrics(thinker: Server) -> None:
    """Where spans are sent, Prometheus gets exemplars beside all of vLLM's own metrics, in a form its parser takes."""
    trace = "1" + TRACE[1:]
    post(
        thinker,
        "chat/completions",
        headers={"traceparent": f"00-{trace}-{PARENT}-01"},
        messages=[{"role": "user", "content": QUESTION}],
    )
    answer = httpx.get(f"{thinker.admin}/metrics", headers={"accept": TYPE})
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    found = [sample.exemplar for sample in families["steering_request_duration_seconds"].samples if sample.exemplar]
    assert trace in {exemplar.labels["trace_id"] for exemplar in found}
    assert "vllm:num_requests_running" in families
