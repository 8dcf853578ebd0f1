"""How vLLM cuts a compiled model into pieces on a GPU, found on a CPU; `driver` has the processes.

There a model is compiled whole. Told to do as on a GPU vLLM traces it, cuts the graph at its splitting ops and compiles
each piece, here without a compiler behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.integration.engine import driver

KIND = "pieces"


@dataclass(kw_only=True)
class PiecesScenario:
    """A model that is compiled, twice.

    Attributes:
        model, bundle: local folders.
        kind: tells the process what to play.
    """

    model: str
    bundle: str
    kind: str = KIND


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What vLLM made of a model.

    Attributes:
        graphs: of each traced graph the custom ops, vLLM's and ours, piece by piece.
        cuts: likewise, whether a piece is one that the graph is cut at.
        splitting: vLLM's splitting ops.
        tokens: an answer.
    """

    graphs: list[list[list[str]]]
    cuts: list[list[bool]]
    splitting: list[str]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The model without a bundle and with one."""

    plain: Pieces
    steered: Pieces


def cut(scenario: PiecesScenario, folder: Path) -> Compared:
    """Have a new process compile the model, on no cache."""
    environment = driver.environment_of({"VLLM_DISABLE_COMPILE_CACHE": "1"}, v2_interpreted=False)
    fields = driver.deliver(asdict(scenario), environment, folder, fresh=True)
    return Compared(**{name: Pieces(**pieces) for name, pieces in fields.items()})


def run_pieces(question: Path) -> Compared:
    """Compile in this process."""
    from steering.engine.plugin import engine_arguments

    fields = json.loads(question.read_text())
    steering = engine_arguments([Path(fields["bundle"])])
    return Compared(plain=_compiled(fields["model"], {}), steered=_compiled(fields["model"], steering))


def _compiled(model: str, steering: dict[str, Any]) -> Pieces:
    from vllm import SamplingParams

    graphs: list[list[list[str]]] = []
    cuts: list[list[bool]] = []
    with _as_on_a_gpu(graphs, cuts), driver.running(model, {**steering, "enforce_eager": False}) as engine:
        parameters = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)
        (output,) = engine.generate([{"prompt_token_ids": [5, 6, 7]}], parameters, use_tqdm=False)
        return Pieces(
            graphs=graphs,
            cuts=cuts,
            splitting=list(engine.llm_engine.vllm_config.compilation_config.splitting_ops),
            tokens=list(output.outputs[0].token_ids),
        )


@contextmanager
def _as_on_a_gpu(graphs: list[list[list[str]]], cuts: list[list[bool]]) -> Iterator[None]:
    """Inside, a model is cut and compiled in pieces, which are noted."""
    from vllm.compilation import backends
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    own, own_split = CpuPlatform.__dict__["check_and_update_config"], backends.split_graph

    def check(cls: type[CpuPlatform], config: Any) -> None:
        own.__func__(cls, config)
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        config.compilation_config.backend = "eager"
        config.compilation_config.compile_sizes = []

    def split(graph: Any, splitting_ops: list[str]) -> Any:
        whole, pieces = own_split(graph, splitting_ops)
        graphs.append([_custom_ops(piece.graph) for piece in pieces])
        cuts.append([piece.is_splitting_graph for piece in pieces])
        return whole, pieces

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[method-assign,assignment]
    backends.split_graph = split
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = own
        backends.split_graph = own_split


def _custom_ops(piece: Any) -> list[str]:
    names = [str(node.target) for node in piece.graph.nodes if node.op == "call_function"]
    return [name.removesuffix(".default") for name in names if name.startswith(("vllm.", "trimtab."))]
