"""Engines in processes of their own into which bundles are loaded while requests run; `driver` has the processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from steering.engine.outcomes import listen, sample_of
from steering.outcome import Outcome
from tests.integration.engine import driver
from tests.integration.engine.scenario import Ask, Got

KIND = "loading"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing done to an engine.

    Attributes:
        do: "ask" adds a request, "run" takes so many engine steps or, with 0, all there are; "load", "unload" and
            "report" are the workers', "order" is given to the scheduler. "crowd" puts a bundle into the bank of the
            last rank alone, behind the back of the others, and "clear" takes it out.
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
    """What came of it.

    Attributes:
        steps: what each came to, by rank where workers did it.
        answers: requests', by name.
        outcomes: that the worker sent.
        in_time, late: requests that are to be told of, a name for each sample: those whose outcome could be read when
            the engine gave their first token, and the others.
        preemptions: of all requests.
        scheduler: its class.
    """

    steps: list[Any]
    answers: dict[str, Got]
    outcomes: list[dict[str, Any]]
    in_time: list[str]
    late: list[str]
    preemptions: int
    scheduler: str


class _Played:
    """An engine and what has come of its requests so far."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.reports: list[Any] = []
        listen(engine.llm_engine, self.reports.append)
        self.asked: dict[str, Ask] = {}
        self.answers: dict[str, Got] = {}
        self.begun: dict[tuple[str, int], bool] = {}
        """By name and sample, whether its outcome came no later than its first token."""

    @property
    def outcomes(self) -> list[Any]:
        """What has been told so far."""
        return [report for report in self.reports if isinstance(report, Outcome)]

    def run(self) -> None:
        """Take one engine step."""
        outputs = self.engine.llm_engine.step()
        told = {(outcome.plan_id, sample_of(outcome.request_id)) for outcome in self.outcomes}
        for output in outputs:
            ask = self.asked[output.request_id]
            for sample in output.outputs:
                place = (output.request_id, sample.index)
                if sample.token_ids and (ask.edit is not None or ask.gate is not None):
                    self.begun.setdefault(place, place in told)
            if output.finished:
                self.answers[output.request_id] = driver.got_of(output)


def play_loading(scenario: LoadingScenario, folder: Path) -> LoadingResult:
    """Run a scenario in a process that has the environment it asks for; see `driver.deliver`."""
    environment = driver.environment_of(scenario.environment, v2_interpreted=scenario.v2_interpreted)
    fields = driver.deliver(asdict(scenario), environment, folder)
    fields["answers"] = {name: Got(**got) for name, got in fields["answers"].items()}
    return LoadingResult(**fields)


def run_loading(question: Path) -> LoadingResult:
    """Play a scenario in this process, which has the environment it asks for."""
    from steering.engine.plugin import engine_arguments
    from tests.integration.engine.ahead import as_asked

    fields = json.loads(question.read_text())
    steps = [
        Step(**{**step, "ask": step["ask"] and Ask(**{**step["ask"], "prompt": tuple(step["ask"]["prompt"])})})
        for step in fields["steps"]
    ]
    steering = engine_arguments(
        [Path(fields["bundle"])],
        terms_per_layer=fields["terms"],
        check_finite=fields["check_finite"],
        is_reporting=True,
    )
    options = {**steering, **fields["arguments"]}
    with as_asked(options), driver.running(fields["model"], options) as engine:
        played = _Played(engine)
        results = [_done(played, step) for step in steps]
        return LoadingResult(
            steps=results,
            answers=played.answers,
            outcomes=[msgspec.structs.asdict(outcome) for outcome in played.outcomes],
            in_time=[name for (name, _), is_in_time in played.begun.items() if is_in_time],
            late=[name for (name, _), is_in_time in played.begun.items() if not is_in_time],
            preemptions=driver.preemptions_of(engine),
            scheduler=type(engine.llm_engine.engine_core.engine_core.scheduler).__name__,
        )


def _done(played: _Played, step: Step) -> Any:
    from steering.bundle import load_bundle
    from steering.engine.roster import BundleNames

    engine = played.engine
    bundle = load_bundle(Path(step.bundle)) if step.bundle else None
    digest = bundle.digest if bundle is not None else ""
    if step.do == "ask":
        assert step.ask is not None
        played.asked[step.name] = step.ask
        parameters = driver.parameters_of(step.ask, digest, step.name)
        engine.llm_engine.add_request(step.name, {"prompt_token_ids": list(step.ask.prompt)}, parameters)
        return None
    if step.do == "run":
        count = 0
        while count < step.count or (not step.count and engine.llm_engine.has_unfinished_requests()):
            played.run()
            count += 1
        return count
    if step.do == "order":
        names = BundleNames.of(bundle).to_fields() if bundle is not None and step.order == "open" else None
        return engine.llm_engine.engine_core.engine_core.scheduler(step.order, digest, names)
    if step.do in {"crowd", "clear"}:
        return engine.collective_rpc(_on_last_rank, args=(step.do, step.bundle, digest))
    arguments = {"load": (step.bundle, digest), "unload": (digest,), "report": ()}[step.do]
    return engine.collective_rpc(f"steering_{step.do}", args=arguments)


def _on_last_rank(worker: Any, do: str, path: str, digest: str) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    from steering.bundle import load_bundle

    if get_tensor_model_parallel_rank() == get_tensor_model_parallel_world_size() - 1:
        bank = worker.model_runner.get_model().steering.bank
        if do == "crowd":
            bank.load(load_bundle(Path(path)))
        else:
            bank.unload(digest)
