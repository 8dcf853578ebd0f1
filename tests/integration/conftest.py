"""Servers that a whole module of tests shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.serving import CONTEXT, MODEL, Server, make_tiny_served_model, serving


@pytest.fixture(scope="session")
def tiny_served_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a tiny random model and of a bundle that forces its first token."""
    return make_tiny_served_model(tmp_path_factory.mktemp("tiny-served"))


@pytest.fixture(scope="session")
def tiny_arguments(tiny_served_model: tuple[Path, Path]) -> tuple[str, ...]:
    """Arguments of `trimtab serve` for the tiny model; eager, since compiling is proved elsewhere and takes long."""
    model, bundle = tiny_served_model
    own = ("--model", str(model), "--bundle", str(bundle), "--served-model-name", MODEL)
    engine = f"--enforce-eager --max-model-len {CONTEXT} --max-num-seqs 64 --dtype float32"
    tools = "--enable-auto-tool-choice --tool-call-parser hermes"
    return (*own, "--", *engine.split(), *tools.split())


@pytest.fixture(scope="module")
def gateway(tiny_arguments: tuple[str, ...]) -> Iterator[Server]:
    """The tiny model, served."""
    with serving(*tiny_arguments) as server:
        yield server
