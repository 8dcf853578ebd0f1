"""The gateway as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.integration.serving import MODEL, START_PATIENCE, serving
from tests.unit.engine.test_parent import lives


def refused(*arguments: str) -> str:
    """The message of a server that does not start; asserts that it ends by itself, with 1."""
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_reachable_host_is_refused(tiny_arguments: tuple[str, ...]) -> None:
    """Without keys nobody else may reach the server; told before the engine starts."""
    assert "no API keys" in refused("serve", "--host", "0.0.0.0", *tiny_arguments)  # noqa: S104 - refused is the point


FORBIDDEN = {
    "worker-cls": ["--worker-cls", "x.Y"],
    "scheduler-cls": ["--scheduler-cls=x.Y"],
    "additional-config": ["--additional_config", '{"a":1}'],
    "api-key": ["--api-key", "x"],
    "served-model-name": ["--served-model-name", "other"],
    "port": ["--port=9"],
    "api-server-count": ["--api-server-count", "2"],
    "middleware": ["--middleware", "x.Y"],
    "trust-request-chat-template": ["--trust-request-chat-template"],
}
PARSE_EACH = """
import json, pathlib, sys
from server.vllm_options import parse_options
from steering.engine.compat import set_environment
from steering.errors import UnsupportedConfiguration
set_environment()
told = {}
for name, options in json.loads(sys.argv[1]).items():
    try:
        parse_options(pathlib.Path("m"), "m", options, {})
    except UnsupportedConfiguration as error:
        told[name] = error.message
allowed = parse_options(pathlib.Path("m"), "n", ["--max-model-len", "99", "--no-enforce-eager"],
                        {"max_model_len": 5, "max_num_seqs": 7, "enforce_eager": True})
told["allowed"] = [allowed.model, allowed.served_model_name, allowed.max_model_len, allowed.max_num_seqs]
told["allowed"].append(allowed.enforce_eager)
print("\\n" + json.dumps(told))
"""


def test_options_that_would_undo_steering_are_refused() -> None:
    """By name, however vLLM's parser lets them be written; others pass, and win over our defaults."""
    ended = subprocess.run(
        [sys.executable, "-c", PARSE_EACH, json.dumps(FORBIDDEN)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told.pop("allowed") == ["m", ["n"], 99, 7, False]
    assert set(told) == set(FORBIDDEN)
    assert all(f"--{name} " in message for name, message in told.items())


def test_bundle_of_another_model_is_refused(tiny_served_model: tuple[Path, Path], tmp_path: Path) -> None:
    """The fingerprint is compared before the engine starts, and the message says which part differs."""
    model, bundle = tiny_served_model
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = other / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    message = refused("serve", "--model", str(other), "--bundle", str(bundle))
    assert "weights_digest" in message
    assert "--accept-transfer" in message
    assert "weights_digest" in refused("bundle", "verify", str(bundle), "--model", str(other))


def test_damaged_bundle_and_missing_folders_are_refused(tiny_served_model: tuple[Path, Path], tmp_path: Path) -> None:
    """One line each, no traceback."""
    model, bundle = tiny_served_model
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes())
    (damaged / "tensors.safetensors").write_bytes((bundle / "tensors.safetensors").read_bytes() + b"x")
    assert "digest" in refused("serve", "--model", str(model), "--bundle", str(damaged))
    assert "config.json" in refused("serve", "--model", str(tmp_path / "nowhere"), "--bundle", str(bundle))
    assert "bundle" in refused("serve", "--model", str(model))


def test_plugin_that_does_not_load_stops_the_start(tiny_arguments: tuple[str, ...]) -> None:
    """A plugin that is not on its list is skipped by vLLM, which would serve unsteered; the check ends it."""
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", *tiny_arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "VLLM_PLUGINS": "another"},
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Ready" not in ended.stdout
    assert any(line.startswith("trimtab: ") for line in ended.stderr.splitlines())


def test_verify_says_what_a_bundle_is(tiny_served_model: tuple[Path, Path]) -> None:
    """`trimtab bundle verify` names the bundle and the model it was made for."""
    model, bundle = tiny_served_model
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli", "bundle", "verify", str(bundle), "--model", str(model)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "tiny-bundle@sha256:" in ended.stdout
    assert "made for the model" in ended.stdout


def test_sigterm_lets_streams_finish(tiny_arguments: tuple[str, ...]) -> None:
    """Not ready at once, new work taken until balancers have seen that and then no more, the streams in flight
    complete, exit code 0.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    body |= {"max_tokens": 450, "ignore_eos": True, "n": 8, "steering": {"mode": "comply"}}
    with serving(*tiny_arguments, TRIMTAB_DRAIN_DELAY="1") as server:
        streams: list[list[str]] = [[] for _ in range(4)]  # so many that they last longer than the delay

        def read(lines: list[str]) -> None:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
                lines.extend(filter(None, response.iter_lines()))

        readers = [threading.Thread(target=read, args=(lines,)) for lines in streams]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + 60
        while not all(streams):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        short = {"model": MODEL, "messages": body["messages"], "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=short, timeout=60).status_code == 200
        while (refusal := httpx.post(f"{server.url}/v1/chat/completions", json=short, timeout=60)).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        for reader in readers:
            reader.join(timeout=120)
        assert server.process.wait(timeout=60) == 0
    for lines in streams:
        assert lines[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line for line in lines) == 8


def test_death_of_the_engine_ends_the_server(tiny_arguments: tuple[str, ...]) -> None:
    """A killed engine process turns every state and request to 503 and cuts streams with a frame; then the server ends
    with an error, so that whatever started it starts it again.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "ignore_eos": True}
    with serving(*tiny_arguments, TRIMTAB_DEATH_DELAY="8") as server:
        (engine,) = engines_of(server.process.pid)
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True, "n": 8}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(engine, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        deadline = time.monotonic() + 5
        while httpx.get(f"{server.url}/readyz").status_code != 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.get(f"{server.url}/livez").status_code == 503
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 503
        assert server.process.wait(timeout=60) == 1


def test_the_engine_does_not_outlive_a_server_that_is_killed(tiny_arguments: tuple[str, ...]) -> None:
    """SIGKILL tells nobody, in mid-answer least of all; the engine's process, with the device it holds, ends soon."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "ignore_eos": True}
    with serving(*tiny_arguments) as server:
        engines = engines_of(server.process.pid)
        assert engines
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True, "n": 8}, timeout=60
        ) as response:
            next(response.iter_lines())
            server.process.kill()
            server.process.wait()
            deadline = time.monotonic() + 10
            while any(map(lives, engines)):
                assert time.monotonic() < deadline, "the engine outlives its server"
                time.sleep(0.1)


def test_told_to_end_while_loading_it_ends(tiny_arguments: tuple[str, ...]) -> None:
    """Cleanly, at once, and with the engine that was just being made."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--admin-port", "0", *tiny_arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_PATIENCE
        while not (engines := engines_of(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert "Ready" not in told
        deadline = time.monotonic() + 10
        while any(map(lives, engines)):
            assert time.monotonic() < deadline, "the engine outlives its server"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def engines_of(process: int) -> list[int]:
    """Processes of engines that a server has started."""
    found = subprocess.run(
        ["ps", "--ppid", str(process), "-o", "pid=,args="], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "EngineCore" in line]
