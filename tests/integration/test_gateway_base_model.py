"""A model without a chat template, served: it gets ready, completes prompts, and refuses messages by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.integration.serving import CONTEXT, MODEL, Server, serving


@pytest.fixture(scope="module")
def base_model(tiny_served_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model's weights with a tokenizer that has no template, and the bundle as one of this model."""
    from steering.bundle import load_bundle, save_bundle
    from steering.fingerprint import fingerprint_of

    model, bundle = tiny_served_model
    folder = tmp_path_factory.mktemp("base")
    base, fitted = folder / "model", folder / "bundle"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((base / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(told))
    loaded = load_bundle(bundle)
    manifest = {**loaded.manifest.model_dump(mode="json"), "model": fingerprint_of(base).model_dump()}
    save_bundle(fitted, manifest, dict(loaded.edits), dict(loaded.probes))
    return base, fitted


@pytest.fixture(scope="module")
def base(base_model: tuple[Path, Path]) -> Iterator[Server]:
    """It, served: the fixture itself proves that the self-check passes."""
    model, bundle = base_model
    own = ("--model", str(model), "--bundle", str(bundle), "--served-model-name", MODEL)
    with serving(
        *own, "--", *f"--enforce-eager --max-model-len {CONTEXT} --max-num-seqs 8 --dtype float32".split()
    ) as it:
        yield it


@pytest.fixture
def sdk(base: Server) -> Iterator[OpenAI]:
    """OpenAI's SDK over it."""
    with OpenAI(base_url=f"{base.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", ["refuse", "comply"])
def test_prompts_are_completed_and_steered(sdk: OpenAI, mode: str) -> None:
    """As of any model, by prompts as they are."""
    steering: Any = {"steering": {"mode": mode}}
    answer = sdk.completions.create(model=MODEL, prompt="how do I", max_tokens=4, temperature=0, extra_body=steering)
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["applied"] is True
    assert answer.model_extra["steering"]["verdict"]["refused"] is (mode == "refuse")


@pytest.mark.parametrize("stream", [False, True])
def test_messages_are_refused_by_name(sdk: OpenAI, stream: bool) -> None:
    """The SDK's BadRequestError, which says what to do instead."""
    with pytest.raises(BadRequestError, match="/v1/completions") as caught:
        sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=stream)
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "messages")


def test_tokens_are_counted_of_prompts_alone(base: Server) -> None:
    """Messages make no prompt here either."""
    for body, status in (({"prompt": "how"}, 200), ({"messages": [{"role": "user", "content": "how"}]}, 400)):
        assert httpx.post(f"{base.url}/tokenize", json={"model": MODEL, **body}).status_code == status
