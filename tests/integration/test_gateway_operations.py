"""What operators do to a server while the real engine works: bundles come and go, clients leave, prompts are probed."""

from __future__ import annotations

import concurrent.futures
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from steering.bundle import load_bundle, save_bundle
from steering.client import steering, steering_of
from tests.integration.asking import GATE_DECIDES, USER, ask, metric
from tests.integration.serving import GATED, MODEL, Server

FREED = 1.0
"""Seconds in which the engine is to be free of a client that has left."""

ROUNDS = 4
"""Tries, of which one must do: what else runs on the machine takes its share of it."""

PATIENCE = 30.0
LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def second(tiny_served_model: tuple[Path, Path]) -> Iterator[str]:
    """A second bundle in the operator's folder: the first one under another name."""
    _, bundle = tiny_served_model
    loaded = load_bundle(bundle)
    folder = bundle.parent / "second"
    save_bundle(
        folder, {**loaded.manifest.model_dump(mode="json"), "name": "second"}, dict(loaded.edits), dict(loaded.probes)
    )
    yield folder.name
    shutil.rmtree(folder)


def administer(gateway: Server, act: str, **fields: str) -> httpx.Response:
    """An act of administration."""
    return httpx.post(f"{gateway.admin}/admin/bundles/{act}", json=fields, timeout=120)


def test_a_bundle_comes_serves_and_goes_while_requests_run(gateway: Server, client: OpenAI, second: str) -> None:
    """Loaded, it steers as the first one does; those in flight never notice; unloaded, it cannot be asked for."""
    listed = httpx.get(f"{gateway.admin}/admin/bundles").json()
    assert listed["loadable"] == ["bundle", "second"]
    assert administer(gateway, "verify", name=second).json()["status"] == "valid"
    want = {mode: ask(client, extra_body=steering(mode=mode, profile="forced")) for mode in ("refuse", "comply")}
    is_over = threading.Event()

    def keep_asking() -> int:
        count = 0
        while not is_over.is_set():
            for mode, expected in want.items():
                answer = ask(client, extra_body=steering(mode=mode, profile="tiny-bundle/forced"))
                assert answer.choices[0].message.content == expected.choices[0].message.content
                count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        others = [pool.submit(keep_asking) for _ in range(4)]
        try:
            for _ in range(2):
                loaded = administer(gateway, "load", name=second)
                assert loaded.status_code == 200, loaded.text
                for mode, expected in want.items():
                    answer = ask(client, extra_body=steering(mode=mode, profile="second/forced"))
                    report = steering_of(answer)
                    assert report is not None
                    assert (report.applied, report.bundle) == (True, loaded.json()["label"])
                    assert answer.choices[0].message.content == expected.choices[0].message.content
                assert administer(gateway, "unload", bundle="second").status_code == 200
                with pytest.raises(BadRequestError):
                    ask(client, extra_body=steering(profile="second/forced"))
        finally:
            is_over.set()
        assert all(other.result() for other in others)
    assert [bundle["name"] for bundle in httpx.get(f"{gateway.admin}/admin/bundles").json()["data"]] == ["tiny-bundle"]
    assert metric(gateway, "steering_unapplied_total") == 0


def test_a_damaged_bundle_changes_nothing(
    gateway: Server, client: OpenAI, second: str, tiny_served_model: tuple[Path, Path]
) -> None:
    """One byte of its tensors: refused by the code of what was found, and the server goes on as it was."""
    tensors = tiny_served_model[1].parent / second / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    for act in ("verify", "load"):
        refused = administer(gateway, act, name=second)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "bundle_digest")
    assert len(httpx.get(f"{gateway.admin}/admin/bundles").json()["data"]) == 1
    assert ask(client, extra_body=steering(mode="comply")).steering["applied"] is True


@pytest.mark.parametrize("prompt", GATE_DECIDES)
def test_a_probe_reads_what_the_gate_of_an_answer_reads(gateway: Server, client: OpenAI, prompt: str) -> None:
    """The same scores, decision and category as the full report of an answer, without one."""
    messages: Any = [{"role": "user", "content": prompt}]
    answer = ask(client, messages=messages, extra_body=steering(profile=GATED, report="full"))
    report = steering_of(answer)
    assert report is not None
    probed = httpx.post(
        f"{gateway.url}/v1/steering/probe",
        json={"model": MODEL, "messages": messages, "profile": GATED},
        timeout=PATIENCE,
    )
    assert probed.status_code == 200, probed.text
    found = probed.json()
    assert (found["decision"], found["category"]) == (report.decision, report.category) == GATE_DECIDES[prompt]
    assert found["scores"]["refusal"] == pytest.approx(report.refusal, abs=1e-4)
    assert found["edit"] == report.edit
    assert found["usage"]["completion_tokens"] == 1


def seconds_until_free(gateway: Server, *, running: float = 0.0) -> float:
    """From now until the engine runs no more than so many requests, and none waits."""
    began = time.monotonic()
    while metric(gateway, "vllm:num_requests_waiting") or metric(gateway, "vllm:num_requests_running") > running:
        assert time.monotonic() < began + PATIENCE, "the engine still works for a client that is gone"
        time.sleep(0.02)
    return time.monotonic() - began


def body_of(phase: str, *, stream: bool) -> dict[str, Any]:
    """A request that is long in this phase."""
    if phase == "prefill":
        filling = [{"role": "user", "content": "the " * 400}]
        return {"model": MODEL, "messages": filling, "stream": stream, **LONG, "max_tokens": 50}
    steered = steering(profile=GATED) if phase == "gate" else {}
    return {"model": MODEL, "messages": USER, "stream": stream, "n": 8, **LONG, **steered}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("phase", "after"), [("gate", 0.02), ("prefill", 0.0), ("prefill", 0.03), ("decode", 0.4)])
def test_clients_that_leave_in_any_phase_free_the_engine(
    gateway: Server, phase: str, after: float, stream: bool
) -> None:
    """Eight at once, some time after they have asked: within a second nothing of them is left."""

    def leave() -> None:
        with suppress(httpx.ReadTimeout), httpx.Client(base_url=gateway.url) as raw:
            limit = httpx.Timeout(PATIENCE, read=max(after, 0.001))
            with raw.stream("POST", "/v1/chat/completions", json=body_of(phase, stream=stream), timeout=limit) as begun:
                assert begun.status_code == 200, begun.read()
                time.sleep(after)

    took: list[float] = []
    while not took or (min(took) >= FREED and len(took) < ROUNDS):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for left in [pool.submit(leave) for _ in range(8)]:
                left.result()
        took.append(seconds_until_free(gateway))
    assert min(took) < FREED, took
    assert metric(gateway, "steering_inflight_requests") == 0


def test_a_client_that_leaves_the_queue_frees_its_place(gateway: Server) -> None:
    """Behind as many as the engine runs at once, it leaves: within a second nothing waits, and those go on."""
    took: list[float] = []
    while not took or (min(took) >= FREED and len(took) < ROUNDS):
        took.append(seconds_until_nothing_waits(gateway))
    assert min(took) < FREED, took


def seconds_until_nothing_waits(gateway: Server) -> float:
    """From when a client leaves that waited behind a full engine; what runs there is answered."""
    with httpx.Client(base_url=gateway.url) as raw, concurrent.futures.ThreadPoolExecutor(16) as pool:
        body = {**body_of("decode", stream=False), "max_tokens": 450}
        busy = [pool.submit(raw.post, "/v1/chat/completions", json=body, timeout=PATIENCE * 4) for _ in range(8)]
        deadline = time.monotonic() + PATIENCE
        while metric(gateway, "vllm:num_requests_running") < 64:
            assert time.monotonic() < deadline, "the engine never was full"
            assert not any(each.done() for each in busy), "the engine was too fast to be filled"
            time.sleep(0.02)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=0.3)
        began = time.monotonic()
        while metric(gateway, "vllm:num_requests_waiting"):
            assert time.monotonic() < began + PATIENCE
            time.sleep(0.02)
        took = time.monotonic() - began
        assert [each.result().status_code for each in busy] == [200] * 8
    return took
