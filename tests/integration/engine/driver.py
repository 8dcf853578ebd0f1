"""Runs one real vLLM engine in a process of its own and plays rounds of requests against it.

`python -m tests.integration.engine.driver SCENARIO.json RESULT.json`. A process per engine, because the model runner,
the compiler and Triton's interpreter are chosen by the environment before vLLM is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DEADLINE = 500.0
"""Seconds an engine process may take; on two cores an engine that compiles is up in 80."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: `edit` None is unsteered; `text` of a plan overrides what the other fields would give."""

    prompt: tuple[int, ...]
    count: int
    edit: str | None = None
    strength: float = 1.0
    scope: str = "generated"
    samples: int = 1
    plan_text: str | None = None


@dataclass(kw_only=True)
class Scenario:
    """One engine and what it is asked: each round is one call, its requests run together.

    Attributes:
        model: local folder.
        bundle: bundle folder; None runs vLLM as if this project were not installed.
        arguments: of `vllm.LLM`.
        rounds: requests of each round.
        environment: on top of the process's own.
        v2_interpreted: Model Runner V2 on Triton's interpreter.
    """

    model: str
    bundle: str | None
    rounds: list[list[Ask]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    v2_interpreted: bool = False


@dataclass(frozen=True, kw_only=True)
class Got:
    """What one request got: per sample its tokens and their log-probabilities, and cached prompt tokens."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: int
    finish: list[str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Answers by round and request, outcomes the worker sent, the worker's report, and preemptions."""

    rounds: list[list[Got]]
    outcomes: list[dict[str, Any]]
    report: dict[str, Any]
    preemptions: int


def play(scenario: Scenario, folder: Path) -> Result:
    """Run a scenario in a fresh process.

    Raises:
        AssertionError: the process failed; carries the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    question, answer, log = folder / "scenario.json", folder / "result.json", folder / "log.txt"
    question.write_text(json.dumps(asdict(scenario)))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if scenario.v2_interpreted else "0",
        **({"TRITON_INTERPRET": "1"} if scenario.v2_interpreted else {}),
        **({"VLLM_PLUGINS": "none"} if scenario.bundle is None else {}),
        **scenario.environment,
    }
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, "-m", "tests.integration.engine.driver", str(question), str(answer)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            check=False,
        ).returncode
    assert code == 0, f"engine process ended with {code}:\n{log.read_text()[-6000:]}"
    fields = json.loads(answer.read_text())
    fields["rounds"] = [[Got(**got) for got in round_] for round_ in fields["rounds"]]
    return Result(**fields)


def _serve_triton_without_gpu() -> None:
    """Give Triton a driver that claims to be active, so that vLLM finds Triton and its V2 runner can be interpreted."""
    import torch
    import triton.backends
    from triton.backends.compiler import GPUTarget

    nvidia = triton.backends.backends["nvidia"]

    class InterpretedDriver(nvidia.driver):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            """No CUDA library is looked for."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

    triton.backends.backends.clear()
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=nvidia.compiler, driver=InterpretedDriver)


def _main(question: Path, answer: Path) -> None:
    fields = json.loads(question.read_text())
    rounds = [[Ask(**{**ask, "prompt": tuple(ask["prompt"])}) for ask in round_] for round_ in fields.pop("rounds")]
    scenario = Scenario(rounds=rounds, **fields)
    if scenario.v2_interpreted:
        _serve_triton_without_gpu()
    import zmq
    from vllm import LLM

    from steering.bundle import load_bundle
    from steering.engine.outcomes import ADDRESS_VARIABLE
    from steering.engine.plugin import engine_arguments

    listener = zmq.Context.instance().socket(zmq.PULL)
    os.environ[ADDRESS_VARIABLE] = f"ipc://{answer.parent / 'outcomes'}"
    listener.bind(os.environ[ADDRESS_VARIABLE])
    digest, steering = "", {}
    if scenario.bundle is not None:
        digest, steering = load_bundle(Path(scenario.bundle)).digest, engine_arguments([Path(scenario.bundle)])
    engine = LLM(
        model=scenario.model,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **{
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
            "seed": 0,
            **steering,
            **scenario.arguments,
        },
    )
    played = [_ask(engine, round_, digest) for round_ in rounds]
    outcomes = []
    while listener.poll(200):
        outcomes.append(json.loads(listener.recv()))
    preemptions = sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    report = engine.collective_rpc("steering_report")[0] if steering else {}
    result = Result(rounds=played, outcomes=outcomes, report=report, preemptions=int(preemptions))
    answer.write_text(json.dumps(asdict(result)))


def _ask(engine: Any, round_: Sequence[Ask], digest: str) -> list[Got]:
    from vllm import SamplingParams

    from steering.plan import PLAN_KEY, Plan, Scope

    parameters = []
    for number, ask in enumerate(round_):
        text = ask.plan_text
        if ask.edit is not None:
            scope = Scope(ask.scope)
            text = Plan(
                id=f"{number}-{ask.edit}", bundle=digest, edit=ask.edit, strength=ask.strength, scope=scope
            ).to_json()
        parameters.append(
            SamplingParams(
                # vLLM refuses n > 1 for greedy requests; this temperature picks the best token all the same.
                temperature=0.0 if ask.samples == 1 else 1e-4,
                seed=1,
                n=ask.samples,
                max_tokens=ask.count,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                extra_args=None if text is None else {PLAN_KEY: text},
            )
        )
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in round_]
    return [
        Got(
            tokens=[list(sample.token_ids) for sample in output.outputs],
            logprobs=[[next(iter(place.values())).logprob for place in sample.logprobs] for sample in output.outputs],
            cached=output.num_cached_tokens or 0,
            finish=[str(sample.finish_reason) for sample in output.outputs],
        )
        for output in engine.generate(prompts, parameters, use_tqdm=False)
    ]


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
