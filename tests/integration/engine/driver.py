"""Real vLLM engines in processes of their own, and rounds of requests played against them.

The model runner, the plugins and Triton's interpreter are chosen by the environment before vLLM is imported, so there
is a process per environment; `python -m tests.integration.engine.driver` is its main programme.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from tests.integration.engine.scenario import Ask, Got, Result, Scenario

ROOT = Path(__file__).parents[3]
DEADLINE = 500.0
"""Seconds an engine process may take; on two cores an engine that compiles is up in 80."""

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of an engine of two ranks; by default vLLM gives every rank on a CPU a NUMA node of its own."""


class EngineFailed(AssertionError):
    """The engine did not start or a request raised; carries the error and the end of the process's output."""


class _Host:
    """A process that plays scenarios one after the other; importing vLLM takes longer than starting a tiny engine."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"engine-{os.getpid()}-{time.monotonic_ns()}.log"
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.engine.driver"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def play(self, question: Path, answer: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\t{answer}\n")
        self._process.stdin.flush()
        end = time.monotonic() + DEADLINE
        while not answer.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise EngineFailed(f"engine process ended or hung:\n{self._log.read_text()[-6000:]}")
            time.sleep(0.05)
        fields: dict[str, Any] = json.loads(answer.read_text())
        if "error" in fields:
            raise EngineFailed(fields["error"])
        return fields

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_HOSTS: dict[tuple[tuple[str, str], ...], _Host] = {}


def play(scenario: Scenario, folder: Path, *, fresh: bool = False) -> Result:
    """Run a scenario on a real engine, in a process that has the environment it asks for; see `deliver`."""
    plugins = {"VLLM_PLUGINS": "none"} if scenario.bundle is None else {}
    environment = environment_of({**plugins, **scenario.environment}, v2_interpreted=scenario.v2_interpreted)
    fields = deliver(asdict(scenario), environment, folder, fresh=fresh)
    fields["rounds"] = [[Got(**got) for got in round_] for round_ in fields["rounds"]]
    return Result(**fields)


def environment_of(own: Mapping[str, str], *, v2_interpreted: bool) -> dict[str, str]:
    """Variables of an engine process, on top of those of this one."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Idle engine processes are kept; their threads must not spin.
        "OMP_WAIT_POLICY": "passive",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if v2_interpreted else "0",
        **({"TRITON_INTERPRET": "1"} if v2_interpreted else {}),
        **own,
    }


def deliver(
    scenario: Mapping[str, Any], chosen: Mapping[str, str], folder: Path, *, fresh: bool = False
) -> dict[str, Any]:
    """Have a process play a scenario.

    Args:
        scenario: its fields.
        chosen: `environment_of` it.
        folder: for the files that carry question and answer, and the process's output.
        fresh: in a new process, which ends afterwards.

    Returns:
        The fields of its result.

    Raises:
        EngineFailed: the engine did not start, or raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = time.monotonic_ns()
    question, answer = folder / f"scenario-{number}.json", folder / f"result-{number}.json"
    question.write_text(json.dumps(scenario))
    environment = {**os.environ, **chosen}
    if fresh:
        host = _Host(environment, folder)
        try:
            return host.play(question, answer)
        finally:
            host.close()
    key = tuple(sorted(chosen.items()))
    if key not in _HOSTS:
        _HOSTS[key] = _Host(environment, folder)
    try:
        return _HOSTS[key].play(question, answer)
    except EngineFailed:
        # What a failed start leaves behind in its process must not reach the next scenario.
        _HOSTS.pop(key).close()
        raise


def close_hosts() -> None:
    """End every engine process that is kept."""
    while _HOSTS:
        _HOSTS.popitem()[1].close()


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


def _main() -> None:
    """Play scenarios until the standard input ends: one line each, the files of question and answer."""
    from tests.integration.engine import configurations, loading, offline, pieces, talks

    if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        _serve_triton_without_gpu()
    _inspect_models_in_this_process()
    players = {
        offline.KIND: offline.run_offline,
        configurations.KIND: configurations.run_configurations,
        pieces.KIND: pieces.run_pieces,
        loading.KIND: loading.run_loading,
        talks.KIND: talks.run_talks,
    }
    for line in sys.stdin:
        question, answer = map(Path, line.rstrip("\n").split("\t"))
        try:
            player = players.get(json.loads(question.read_text()).get("kind"))
            fields = asdict(player(question) if player else _run(question))
        except BaseException:  # noqa: BLE001 - whatever it is, the waiting test must hear of it
            fields = {"error": traceback.format_exc()}
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(fields, default=msgspec.to_builtins))
        partial.rename(answer)


def _inspect_models_in_this_process() -> None:
    """Have vLLM look at a model class here and not in a process of its own, which takes longer than a tiny engine.

    It keeps the finding in its cache, so this matters for the first engine of a family only. The reason for that
    process is to keep CUDA out of this one; servers under test are started as vLLM starts them.
    """
    import numba  # noqa: F401 - the model classes load it; `startable` hides what was loaded before
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def _run(question: Path) -> Result:
    from steering.bundle import load_bundle
    from steering.engine.outcomes import listen
    from steering.engine.plugin import engine_arguments
    from steering.outcome import Outcome, Response
    from tests.integration.engine.ahead import as_asked

    fields = json.loads(question.read_text())
    rounds = [[Ask(**{**ask, "prompt": tuple(ask["prompt"])}) for ask in round_] for round_ in fields.pop("rounds")]
    scenario = Scenario(rounds=rounds, **fields)
    digest, steering = "", {}
    if scenario.bundle is not None:
        digest = load_bundle(Path(scenario.bundle)).digest
        steering = engine_arguments([Path(scenario.bundle)], is_reporting=True)
    with (
        as_asked({**steering, **scenario.arguments}),
        running(scenario.model, {**steering, **scenario.arguments}) as engine,
    ):
        reports: list[Any] = []
        listen(engine.llm_engine, reports.append)
        played, steps, preempted = [], [steps_of(engine)], [preemptions_of(engine)]
        for number, round_ in enumerate(rounds):
            played.append(_ask(engine, round_, digest, number))
            steps.append(steps_of(engine))
            preempted.append(preemptions_of(engine))
        outcomes = [msgspec.structs.asdict(each) for each in reports if isinstance(each, Outcome)]
        read = [each for each in reports if isinstance(each, Response)]
        responses = [[each.plan_id, each.request_id, each.tokens, each.score] for each in read]
        report = engine.collective_rpc("steering_report")[0] if steering else {}
        return Result(
            rounds=played,
            steps=[after - before for before, after in itertools.pairwise(steps)],
            preempted=[after - before for before, after in itertools.pairwise(preempted)],
            outcomes=outcomes,
            responses=responses,
            report=report,
            scheduler=type(engine.llm_engine.engine_core.engine_core.scheduler).__name__,
        )


@contextmanager
def running(model: str, arguments: Mapping[str, Any]) -> Iterator[Any]:
    """A `vllm.LLM` that is ended on the way out, so that the next one can be started in this process."""
    import gc

    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from steering.engine.compat import startable

    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0, **arguments}
    with startable():
        engine = LLM(model=model, skip_tokenizer_init=True, disable_log_stats=False, **options)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def preemptions_of(engine: Any) -> int:
    """Requests that were preempted so far, by vLLM's own count."""
    return int(sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"))


def steps_of(engine: Any) -> int:
    """Forward passes so far, by vLLM's own count."""
    return sum(metric.count for metric in engine.get_metrics() if metric.name == "vllm:iteration_tokens_total")


def _nearly_greedy(samples: int) -> dict[str, Any]:
    """Sampling parameters that pick the best token; vLLM refuses n > 1 for greedy requests.

    Of one candidate the best is picked whatever the temperature, but the V2 runner's kernel for that cannot be
    interpreted. There the temperature is vLLM's lowest, at which a token nearly as good may be drawn.
    """
    if samples == 1:
        return {"temperature": 0.0}
    is_v2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    return {"temperature": 1e-4} if is_v2 else {"temperature": 1.0, "top_k": 1}


def parameters_of(ask: Ask, digest: str, plan_id: str) -> Any:
    """VLLM's sampling parameters for a request, with its plan; `digest` is its bundle's, empty where there is none."""
    from vllm import SamplingParams

    from steering.plan import PLAN_KEY, GateOrder, Plan, Reasoning, Scope

    text = ask.plan_text
    if ask.edit is not None or ask.gate is not None or ask.response:
        text = Plan(
            id=plan_id,
            bundle=digest,
            edit=ask.edit,
            gate=None if ask.gate is None else GateOrder(**ask.gate),
            strength=ask.strength,
            scope=Scope(ask.scope),
            response=ask.response,
            reasoning=Reasoning(ask.reasoning),
        ).to_json()
    return SamplingParams(
        **_nearly_greedy(ask.samples),
        # Stock vLLM 0.32 ends a CPU engine at a seeded request whose prompt is chunked; ours must not.
        seed=1 if digest else None,
        n=ask.samples,
        max_tokens=ask.count,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if ask.prompt_logprobs else None,
        detokenize=False,
        extra_args=None if text is None else {PLAN_KEY: text},
    )


def _ask(engine: Any, round_: Sequence[Ask], digest: str, round_number: int) -> list[Got]:
    from tests.integration.engine.stepping import step_through

    parameters = [parameters_of(ask, digest, f"{round_number}-{number}") for number, ask in enumerate(round_)]
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in round_]
    if any(ask.abort_at is not None for ask in round_):
        outputs, aborted = step_through(engine, prompts, parameters, [ask.abort_at for ask in round_])
    else:
        outputs, aborted = engine.generate(prompts, parameters, use_tqdm=False), {}
    return [got_of(output, aborted.get(number, "")) for number, output in enumerate(outputs)]


def got_of(output: Any, aborted: str = "") -> Got:
    """What a request got, of vLLM's `RequestOutput`."""
    return Got(
        tokens=[list(sample.token_ids) for sample in output.outputs],
        logprobs=[[next(iter(place.values())).logprob for place in sample.logprobs] for sample in output.outputs],
        cached=output.num_cached_tokens or 0,
        finish=[str(sample.finish_reason) for sample in output.outputs],
        prompt_logprobs=[next(iter(place.values())).logprob for place in (output.prompt_logprobs or [])[1:]],
        aborted=aborted,
    )


if __name__ == "__main__":
    _main()
