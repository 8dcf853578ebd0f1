"""Offline engines in processes of their own, and rounds of asks played against them; `driver` has the processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.engine import driver

KIND = "offline"


@dataclass(frozen=True, kw_only=True)
class OfflineAsk:
    """One ask of an offline engine; `order` holds the fields of an `EditOrder`, without the bundle."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 4
    order: dict[str, Any] | None = None
    capture: bool = False


@dataclass(kw_only=True)
class OfflineScenario:
    """An `OfflineEngine` and what it is asked, round by round.

    Attributes:
        model, bundle: local folders; bundle None loads none.
        capture: fields of `CaptureSettings`; None captures nothing.
        rounds: each is one call of `ask`.
        arguments: options of vLLM.
        v2_interpreted: Model Runner V2 on Triton's interpreter.
        only_capture: `capture` is called in place of `ask`.
        kind: tells the process what to play.
    """

    model: str
    bundle: str | None = None
    capture: dict[str, Any] | None = None
    rounds: list[list[OfflineAsk]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    v2_interpreted: bool = False
    only_capture: bool = False
    kind: str = KIND


@dataclass(frozen=True, kw_only=True)
class OfflineResult:
    """Answers by round, as JSON has them, and the worker's report."""

    rounds: list[list[dict[str, Any]]]
    report: dict[str, Any]


def play_offline(scenario: OfflineScenario, folder: Path) -> OfflineResult:
    """Run a scenario in a process that has the environment it asks for; see `driver.deliver`."""
    environment = driver.environment_of(scenario.environment, v2_interpreted=scenario.v2_interpreted)
    return OfflineResult(**driver.deliver(asdict(scenario), environment, folder))


def run_offline(question: Path) -> OfflineResult:
    """Play a scenario in this process, which has the environment it asks for."""
    from steering.engine.offline import Ask as EngineAsk
    from steering.engine.offline import CaptureSettings, EditOrder, OfflineEngine
    from steering.plan import Scope

    fields = json.loads(question.read_text())
    capture = fields["capture"]
    if capture is not None:
        capture = CaptureSettings(**{**capture, "folder": Path(capture["folder"]), "layers": tuple(capture["layers"])})
    bundles = [Path(fields["bundle"])] if fields["bundle"] else []
    options = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True, **fields["arguments"]}
    rounds: list[list[dict[str, Any]]] = []
    with OfflineEngine(Path(fields["model"]), bundles=bundles, capture=capture, options=options) as engine:
        for round_ in fields["rounds"]:
            asks = []
            for ask in round_:
                order, answer = ask.pop("order"), ask.pop("answer")
                what: dict[str, Any] = {
                    "prompt": tuple(ask.pop("prompt")),
                    "answer": None if answer is None else tuple(answer),
                    "edit": None
                    if order is None
                    else EditOrder(bundle=engine.bundles[0].digest, **{**order, "scope": Scope(order["scope"])}),
                }
                asks.append(EngineAsk(**ask, **what))
            if fields["only_capture"]:
                rounds.append([{"count": engine.capture(asks).count}])
            else:
                rounds.append([asdict(answer) for answer in engine.ask(asks)])
        report = engine.report()
    return OfflineResult(rounds=rounds, report=report)
