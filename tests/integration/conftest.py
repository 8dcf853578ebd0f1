"""Servers that whole modules of tests share."""

from __future__ import annotations

import fcntl
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.integration.serving import CONTEXT, MODEL, SHADOWED, Server, make_tiny_served_model, serving


@pytest.fixture(scope="module", autouse=True)
def _one_server_at_a_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests of servers look at the clock: of two modules that `make test` would run side by side, one waits."""
    if request.path.parent != Path(__file__).parent:
        yield
        return
    # The folder above is that of all processes of one run, or of one user's runs.
    with (tmp_path_factory.getbasetemp().parent / "servers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_served_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a tiny random model and of a bundle that forces its first token."""
    return make_tiny_served_model(tmp_path_factory.mktemp("tiny-served"))


@pytest.fixture(scope="session")
def tiny_arguments(tiny_served_model: tuple[Path, Path]) -> tuple[str, ...]:
    """Arguments of `trimtab serve` for the tiny model; eager, since compiling is proved elsewhere and takes long."""
    model, bundle = tiny_served_model
    own = ("--model", str(model), "--bundle", str(bundle), "--served-model-name", MODEL)
    own += ("--bundle-folder", str(bundle.parent))
    engine = f"--enforce-eager --max-model-len {CONTEXT} --max-num-seqs 64 --dtype float32"
    tools = "--enable-auto-tool-choice --tool-call-parser hermes"
    return (*own, "--", *engine.split(), *tools.split())


@pytest.fixture(scope="session")
def gateway(tiny_arguments: tuple[str, ...]) -> Iterator[Server]:
    """The tiny model, served, one profile in shadow; one server for all modules of a process that ask for it."""
    with serving(*tiny_arguments, TRIMTAB_ENFORCED_SHARE=json.dumps({SHADOWED: 0})) as server:
        yield server


@pytest.fixture(scope="session")
def client(gateway: Server) -> Iterator[OpenAI]:
    """The SDK, without its retries."""
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def parallel(gateway: Server) -> AsyncIterator[AsyncOpenAI]:
    """The asynchronous SDK, without its retries."""
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk
