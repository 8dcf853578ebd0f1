"""Engines in processes of their own into which bundles are loaded while requests run; `driver` has the processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.integration.engine import driver
from tests.integration.engine.scenario import Ask, Got

KIND = "loading"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing done to an engine.

    Attributes:
        do: "ask" adds a request, "run" takes so many engine steps or, with 0, all there are; "load", "unload" and
            "report" are the workers', "order" is given to the scheduler.
        name: of the request.
        ask: the request.
        bundle: folder of the bundle that is meant.
        order: "open", "close" or "revive".
        count: of engine steps.
    """

    do: str
    name: str = ""
    ask: Ask | None = None
    bundle: str = ""
    order: str = ""
    count: int = 0


@dataclass(kw_only=True)
class LoadingScenario:
    """An engine that is started with a bundle, and what is done to it in turn.

    Attributes:
        model, bundle: local folders.
        terms: rows of each layer's table.
        steps: in turn.
        check_finite: the finite check is on.
        arguments, environment, v2_interpreted: as of `Scenario`.
        kind: tells the process what to play.
    """

    model: str
    bundle: str
    terms: int
    steps: list[Step]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    v2_interpreted: bool = False
    check_finite: bool = False
    kind: str = KIND


@dataclass(frozen=True, kw_only=True)
class LoadingResult:
    """What each step came to, requests' answers by name, and the outcomes that the worker sent."""

    steps: list[Any]
    answers: dict[str, Got]
    outcomes: list[dict[str, Any]]


def play_loading(scenario: LoadingScenario, folder: Path) -> LoadingResult:
    """Run a scenario in a process that has the environment it asks for; see `driver.deliver`."""
    environment = driver.environment_of(scenario.environment, v2_interpreted=scenario.v2_interpreted)
    fields = driver.deliver(asdict(scenario), environment, folder)
    fields["answers"] = {name: Got(**got) for name, got in fields["answers"].items()}
    return LoadingResult(**fields)


def run_loading(question: Path, inbox: Any) -> LoadingResult:
    """Play a scenario in this process, which has the environment it asks for."""
    import gc

    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from steering.engine.compat import startable
    from steering.engine.plugin import engine_arguments

    fields = json.loads(question.read_text())
    steps = [
        Step(**{**step, "ask": step["ask"] and Ask(**{**step["ask"], "prompt": tuple(step["ask"]["prompt"])})})
        for step in fields["steps"]
    ]
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0, **fields["arguments"]}
    with startable():
        engine = LLM(
            model=fields["model"],
            skip_tokenizer_init=True,
            **engine_arguments(
                [Path(fields["bundle"])], terms_per_layer=fields["terms"], check_finite=fields["check_finite"]
            ),
            **options,
        )
    try:
        answers: dict[str, Got] = {}
        results = [_done(engine, step, answers) for step in steps]
        told, _ = inbox.drain()
        return LoadingResult(steps=results, answers=answers, outcomes=msgspec.to_builtins(told))
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def _done(engine: Any, step: Step, answers: dict[str, Got]) -> Any:
    from steering.bundle import load_bundle
    from steering.engine.roster import BundleNames

    bundle = load_bundle(Path(step.bundle)) if step.bundle else None
    digest = bundle.digest if bundle is not None else ""
    if step.do == "ask":
        assert step.ask is not None
        parameters = driver.parameters_of(step.ask, digest, step.name)
        engine.llm_engine.add_request(step.name, {"prompt_token_ids": list(step.ask.prompt)}, parameters)
        return None
    if step.do == "run":
        count = 0
        while count < step.count or (not step.count and engine.llm_engine.has_unfinished_requests()):
            for output in engine.llm_engine.step():
                if output.finished:
                    answers[output.request_id] = driver.got_of(output)
            count += 1
        return count
    if step.do == "order":
        names = BundleNames.of(bundle).to_fields() if bundle is not None and step.order == "open" else None
        return engine.llm_engine.engine_core.engine_core.scheduler(step.order, digest, names)
    arguments = {"load": (step.bundle, digest), "unload": (digest,), "report": ()}[step.do]
    return engine.collective_rpc(f"steering_{step.do}", args=arguments)
