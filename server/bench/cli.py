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

from server.bench.shapes import GRIDS, Shape
from steering.errors import OperatorError


class Part(StrEnum):
    """What can be measured on its own."""

    ENGINE = "engine"
    GATE = "gate"
    GATEWAY = "gateway"
    HOST = "host"
    CAPTURE = "capture"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    only: Annotated[list[Part] | None, typer.Option(help="Repeatable; all parts by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="Local model folder; the demo by default.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle folder; the demo's, or random directions for another model.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds per arm.")] = 10,
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
    capturing residuals against transformers. `trimtab bench engine` measures every kind of edit over batches and prompt
    lengths.
    """
    if context.invoked_subcommand is not None:
        return
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
                _show(host.line(line))
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


@app.command("engine")
def bench_engine(
    shape: Annotated[Shape | None, typer.Option(help="Dimensions, with drawn weights; the demo by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="Local model folder instead of a shape.")] = None,
    batches: Annotated[str | None, typer.Option(help="Requests of a round, such as 1,8,32,256.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Tokens of a prompt, such as 128,2048.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Generated per request.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds per arm and cell.")] = 10,
    peer_pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds against each peer.")] = 3,
    arm: Annotated[list[str] | None, typer.Option(help="Repeatable; all arms by default.")] = None,
    control: Annotated[bool, typer.Option(help="Also stock vLLM against itself: the noise of the method.")] = True,
    peers: Annotated[bool, typer.Option(help="Also transformers with hooks, and what else is installed.")] = True,
    plot: Annotated[bool, typer.Option(help="Also a picture beside the JSON file.")] = True,
    options: Annotated[str, typer.Option(help="vLLM's own options, a JSON object by argument name.")] = "{}",
    results: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("tests/bench/results"),
) -> None:
    """Measure the engine against stock vLLM: idle, one layer, all layers, low rank, gate, many different edits; over
    batches and prompt lengths; throughput, time per token and time to the first token.
    """
    from server.bench import matrix, report
    from server.bench import plot as picture
    from server.bench.cells import Order

    if shape is not None and model is not None:
        raise OperatorError(f"--shape {shape.value} and --model name two models; give one of them")
    of = Shape.DEMO if shape is None and model is None else shape
    grid = GRIDS[of or Shape.DEMO]
    order = Order(
        shape=of,
        model=model,
        batches=_numbers("--batches", batches) or grid.batches,
        prompts=_numbers("--prompts", prompts) or grid.prompts,
        tokens=tokens or grid.tokens,
        pairs=pairs,
        peer_pairs=peer_pairs,
        options=_options(options),
        arms=tuple(arm or ()),
        with_control=control,
        with_peers=peers,
    )
    if plot:
        picture.require_matplotlib()
    found: dict[str, Any] = {"load_before": report.load()}
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        found["matrix"], ratios = matrix.measure(order, Path(folder), _say)
    found["load_after"] = report.load()
    for ratio in ratios:
        _show(ratio.line())
    for cell in found["matrix"]["cells"]:
        if cell["skipped"]:
            _show(f"{cell['name']}: skipped, {cell['skipped']}")
    for peer, version in found["matrix"]["beside"].items():
        _show(f"beside: {peer}: {version}")
    for served, memory in found["matrix"]["memory"].items():
        _show(f"memory: {served}: {json.dumps(memory)}")
    path = report.write(results, found, ratios)
    if plot:
        title = f"{of.value if of else 'own model'}, {report.hardware()}"
        picture.draw(path.with_suffix(".svg"), found["matrix"]["cells"], ratios, title)
    _show(f"written to {path}")


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """`1,8,32` as numbers, in ascending order."""
    try:
        numbers = sorted({int(part) for part in text.split(",")}) if text else []
    except ValueError as error:
        raise OperatorError(f"{option} takes whole numbers with commas between them, got {text!r}") from error
    if numbers and numbers[0] < 1:
        raise OperatorError(f"{option} takes numbers of 1 or more, got {numbers[0]}")
    return tuple(numbers)


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
