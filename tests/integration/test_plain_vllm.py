"""Plain `vllm serve` with the plugin: vLLM's own server, plans in `vllm_xargs`, and nothing unsteered in silence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from steering.bundle import Bundle, load_bundle
from steering.engine.compat import ENVIRONMENT
from steering.plan import PLAN_KEY, Mode, Plan
from steering.profile_plan import plan_of_profile
from tests.integration.serving import CONTEXT, GATED, MODEL, RESPOND, START_PATIENCE, prompt_ids

DEMO_BUNDLE = Path(__file__).resolve().parents[2] / "artifacts" / "demo" / "bundle"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plain_vllm.py"
PROMPT = "how do I kill a process"


def example(*given: object) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLE), *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.removesuffix("\n")


def server_of(model: Path, options: str, log: Path, port: int) -> subprocess.Popen[bytes]:
    """VLLM's own server with these engine options."""
    server = f"-m vllm.entrypoints.openai.api_server --model {model}"
    own = f"--served-model-name {MODEL} --host 127.0.0.1 --port {port} --enforce-eager --dtype float32"
    limits = f"--max-model-len {CONTEXT} --max-num-seqs 8"
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *server.split(), *own.split(), *limits.split(), *options.split()],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"},
        )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_up(url: str) -> bool:
    """Whether the server says that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own server
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def plain(tiny_served_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny model with its bundle, served by vLLM alone; its URL."""
    model, bundle = tiny_served_model
    log, port = tmp_path_factory.mktemp("plain") / "log", free_port()
    process, url = server_of(model, example("arguments", model, bundle), log, port), f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_PATIENCE
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def loaded(tiny_served_model: tuple[Path, Path]) -> Bundle:
    """The bundle that is served."""
    return load_bundle(tiny_served_model[1])


@pytest.fixture(scope="module")
def client(plain: str) -> Iterator[OpenAI]:
    """OpenAI's own client, without its retries."""
    with OpenAI(base_url=f"{plain}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk


def answer(client: OpenAI, plan: Plan | str | None, prompt: str = PROMPT, **more: Any) -> str:
    """A greedy answer, special tokens shown, as the bundle's edits force one."""
    xargs = {} if plan is None else {"vllm_xargs": {PLAN_KEY: plan if isinstance(plan, str) else plan.to_json()}}
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        extra_body={"skip_special_tokens": False, "max_tokens": 8, **xargs, **more},
    )
    return whole.choices[0].message.content or ""


def test_a_plan_steers(client: OpenAI, loaded: Bundle) -> None:
    """The side that is named, and the one a gate takes, of plans made from the bundle's profiles."""
    assert answer(client, plan_of_profile(loaded, mode=Mode.COMPLY)).startswith(RESPOND)
    assert answer(client, plan_of_profile(loaded, mode=Mode.REFUSE)).startswith("[Safety]")
    assert answer(client, plan_of_profile(loaded, GATED), "how do I rob a bank").startswith("[Safety]")
    assert answer(client, plan_of_profile(loaded, GATED), "how do I kill a process").startswith(RESPOND)


def test_a_request_without_a_plan_is_the_models_own(client: OpenAI, tiny_served_model: tuple[Path, Path]) -> None:
    """Greedy, the tokens that transformers picks from the same weights; also between steered ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, _ = tiny_served_model
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = prompt_ids(model, PROMPT)
    with torch.inference_mode():
        for _ in range(8):
            tokens = torch.cat([tokens, network(tokens).logits[:, -1:].argmax(-1)], dim=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert answer(client, None) == tokenizer.decode(tokens[0, -8:], skip_special_tokens=False)


def test_what_cannot_be_followed_is_an_error_and_never_an_answer(client: OpenAI, loaded: Bundle) -> None:
    """A bundle that is not loaded, a plan that is none, vLLM's beam search, which drops the plan; others go on."""
    plan = plan_of_profile(loaded, mode=Mode.COMPLY)
    unknown = json.dumps({**json.loads(plan.to_json()), "bundle": "sha256:" + "0" * 64})
    cases: list[tuple[Plan | str, dict[str, Any]]] = [(unknown, {}), ("not a plan", {})]
    cases.append((plan, {"use_beam_search": True, "n": 2}))
    for bad, more in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            answer(client, bad, **more)
        assert caught.value.status_code >= 500
    assert answer(client, plan).startswith(RESPOND)


def test_the_example_asks(plain: str, tiny_served_model: tuple[Path, Path], client: OpenAI, loaded: Bundle) -> None:
    """`examples/plain_vllm.py` prints the answer that its plan leads to."""
    plan = plan_of_profile(loaded, mode=Mode.COMPLY)
    expected = answer(client, plan, skip_special_tokens=True, max_tokens=64)
    assert example("ask", tiny_served_model[1], PROMPT, "--url", plain, "--mode", "comply") == expected


def test_another_models_bundle_gives_no_arguments(tiny_served_model: tuple[Path, Path]) -> None:
    """VLLM's own server does not look for whom a bundle was made; the example does."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        example("arguments", tiny_served_model[0], DEMO_BUNDLE)
    assert "FingerprintMismatch" in caught.value.stderr
