"""The OpenAI Python SDK's own API tests, against the gateway over the fake engine.

`TRIMTAB_REAL_ENGINE=1 make test ARGS="tests/conformance -k real_engine"` runs them over vLLM on the CPU, in minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conformance.sdk import MODELS, Ran, by_design, differences, fetch, run
from tests.fake_server import fake_serving
from tests.integration.serving import CONTEXT, make_tiny_served_model, serving


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK's source archive, kept with pytest's cache where there is one."""
    cache = getattr(request.config, "cache", None)
    return fetch(cache.mkdir("openai") if cache is not None else tmp_path_factory.mktemp("openai"))


@pytest.mark.parametrize("model", MODELS)
def test_what_fails_of_the_sdks_own_tests_is_what_the_list_says(sources: Path, model: str) -> None:
    """Each test passes, or is on the list with its reason and fails with the status that is given there."""
    with fake_serving("--model", model, "--gated") as server:
        ran = run(sources, server.url, MODELS[model])
    assert not differences(ran, by_design(MODELS[model]))
    assert len(ran.passed) >= 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its bundle."""
    return make_tiny_served_model(tmp_path_factory.mktemp("tiny-served"))


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("TRIMTAB_REAL_ENGINE"), reason="minutes over vLLM: set TRIMTAB_REAL_ENGINE")
@pytest.mark.parametrize("model", MODELS)
def test_the_same_fails_over_the_real_engine(sources: Path, tiny: tuple[Path, Path], model: str) -> None:
    """The list holds for vLLM as for the script."""
    folder, bundle = tiny
    own = ("--model", str(folder), "--bundle", str(bundle), "--served-model-name", model)
    engine = f"--enforce-eager --max-model-len {CONTEXT} --max-num-seqs 16 --dtype float32"
    tools = "--enable-auto-tool-choice --tool-call-parser hermes"
    with serving(*own, "--", *engine.split(), *tools.split()) as server:
        ran = run(sources, server.url, MODELS[model])
    print(f"{model}: {ran.variants} run, {len(ran.passed)} passed, {len(ran.failed)} failed")  # noqa: T201 - figures
    assert not differences(ran, by_design(MODELS[model]))


def test_a_wrong_list_is_told_in_every_direction() -> None:
    """A test missing from the list, one too many on it, one that is gone, and one that fails for another reason."""
    ran = Ran(passed=frozenset({"a"}), failed={"b": "Error code: 500 - x", "c": "Error code: 404 - x"}, variants=3)
    told = differences(ran, {"a": 400, "c": 400, "d": 404})
    assert [line.partition(":")[0] for line in told] == ["a", "b", "c", "d"]
    assert not differences(ran, {"b": 500, "c": 404})
