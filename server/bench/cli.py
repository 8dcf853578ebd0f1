"""`trimtab bench`: what steering costs on this machine, printed as ratios and kept as JSON.

Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from steering.errors import OperatorError


class Part(StrEnum):
    """What can be measured on its own."""

    ENGINE = "engine"
    GATE = "gate"
    GATEWAY = "gateway"
    HOST = "host"
    CAPTURE = "capture"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    only: Annotated[list[Part] | None, typer.Option(help="Repeatable; all parts by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="Local model folder; the demo by default.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle folder; the demo's, or random directions for another model.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds per arm.")] = 20,
    batch: Annotated[
        int, typer.Option(min=1, help="Requests of an engine round, and concurrency of the gateway's.")
    ] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per request of an engine round.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a gateway round.")] = 192,
    answer: Annotated[int, typer.Option(min=1, help="Tokens per answer of a gateway round.")] = 16,
    control: Annotated[bool, typer.Option(help="Also stock vLLM against itself: the noise of the method.")] = False,
    options: Annotated[
        str, typer.Option(help="vLLM's own options, a JSON object by argument name.")
    ] = '{"max_model_len": 512}',
    results: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("tests/bench/results"),
) -> None:
    """Measure throughput against stock vLLM: idle, steered, all distinct; the gateway against vLLM's server; and
    capturing residuals against transformers.
    """
    from server.bench import capture, engine, gateway, host, report
    from server.bench.subject import subject_of

    parts = set(only or Part)
    given = _options(options)
    found: dict[str, Any] = {}
    ratios: list[report.Ratio] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        subject = subject_of(model, bundle, Path(folder))
        found |= {"subject": subject.facts, "load_before": report.load()}
        if Part.HOST in parts:
            found["host"] = host.measure(subject)
            for line in found["host"]:
                facts = f"{line['requests']} requests, {line['steered']} steered"
                _show(f"host: {facts}: {line['microseconds_per_step']} µs per step")
        if Part.ENGINE in parts or Part.GATE in parts:
            found["engine"], measured = engine.measure(
                subject,
                pairs=pairs,
                batch=batch,
                tokens=tokens,
                options=given,
                with_control=control,
                with_stock=Part.ENGINE in parts,
                say=_say,
            )
            ratios += measured
        if Part.GATEWAY in parts:
            found["gateway"], measured = gateway.measure(
                subject,
                pairs=pairs,
                requests=requests,
                concurrency=batch,
                tokens=answer,
                options=given,
                say=_say,
            )
            ratios += measured
        if Part.CAPTURE in parts:
            found["capture"], measured = capture.measure(
                subject, pairs=pairs, batch=batch, tokens=tokens, options=given, say=_say
            )
            ratios += measured
        found["load_after"] = report.load()
    for ratio in ratios:
        _show(ratio.line())
    _show(f"written to {report.write(results, found, ratios)}")


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise OperatorError(f"--options must be a JSON object: {error}") from error
    if not isinstance(options, dict):
        raise OperatorError(f"--options must be a JSON object, got {type(options).__name__}")
    return options


def _say(progress: str) -> None:
    sys.stderr.write(f"{progress}\n")
    sys.stderr.flush()


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
