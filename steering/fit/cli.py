"""`trimtab fit`: fit a probe, edits and a gate on a model and write its bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from steering.fit.cli_topics import topics

app = typer.Typer(help="Fit a probe, edits and a gate on a model and write its bundle.", no_args_is_help=True)


class StageName(StrEnum):
    """The stages of `trimtab fit control`, in order; the same as `steering.fit.pipeline.Stage`."""

    ACTIVATIONS = "activations"
    VECTORS = "vectors"
    LAYERS = "layers"
    PROBE = "probe"
    HEAD = "head"
    LOW_RANK = "low_rank"
    NULL_SPACE = "null_space"
    DOSES = "doses"
    GATE = "gate"
    COMPARE = "compare"
    HELD = "held"
    RESPONSE = "response"
    BUNDLE = "bundle"
    REPORT = "report"


class PresetName(StrEnum):
    """`auto` picks constants on calibration prompts, `paper` takes those of arXiv 2603.13359."""

    AUTO = "auto"
    PAPER = "paper"


class CovarianceName(StrEnum):
    """How the covariance of the low-rank basis is kept from being singular."""

    PAPER = "paper"
    RELATIVE = "relative"
    LEDOIT_WOLF = "ledoit-wolf"


class DtypeName(StrEnum):
    """Of the weights in memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.callback()
def main() -> None:
    """Fit a probe, edits and a gate on a model and write its bundle."""


app.command()(topics)


@app.command()
def control(
    stage: Annotated[StageName, typer.Option(help="Last stage to run.")] = StageName.REPORT,
    preset: Annotated[PresetName, typer.Option(help="Where constants come from.")] = PresetName.AUTO,
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("artifacts/demo/model"),
    bundle: Annotated[Path, typer.Option(help="Folder the bundle is written to.")] = Path("refusal-control-bundle"),
    data: Annotated[Path | None, typer.Option(help="Data directory; else $TRIMTAB_DATA, else a cache.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of stage results; else <user cache>/trimtab/fit.")] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle.")] = "refusal-control",
    version: Annotated[str, typer.Option(help="Version of the bundle.")] = "1",
    *,
    layer: Annotated[int | None, typer.Option(help="Layer of probe and edits; else chosen, or the paper's.")] = None,
    fpr: Annotated[
        float | None, typer.Option(help="False positive rate of the second operating point; 0.05.", min=0.0, max=1.0)
    ] = None,
    safety_margin: Annotated[
        float | None,
        typer.Option(help="Share of prompts to refuse that the gate may refuse less; 0.015.", min=0.0, max=1.0),
    ] = None,
    plain_missed: Annotated[
        float | None,
        typer.Option(help="Share of plain prompts that may be taken for others; 0.01.", min=0.0, max=1.0),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Data set to leave out, so that it can be tested on; repeatable.")
    ] = None,
    covariance: Annotated[CovarianceName | None, typer.Option(help="Of the low-rank basis; paper.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Coordinates a direction keeps; 200 unless told.", min=1)] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of the weights in memory.")] = DtypeName.FLOAT32,
    device_map: Annotated[str | None, typer.Option(help="As transformers takes it, such as auto.")] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts of one length in one pass; 64.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts: to try it out, not to use the bundle.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Probe, category edits, gate and every baseline of arXiv 2603.13359, with doses and thresholds of their own."""
    import torch

    from steering.errors import TrimtabError
    from steering.fit.control import QUICK, Preset, open_fit, preset_settings
    from steering.fit.low_rank import Covariance
    from steering.fit.pipeline import Stage, fit_control

    torch.set_num_threads(threads)
    if work is None:
        from platformdirs import user_cache_path

        work = user_cache_path("trimtab") / "fit" / name
    settings = preset_settings(
        Preset(preset),
        **(QUICK if quick else {}),
        layer=layer,
        false_positive_rate=fpr,
        safety_margin=safety_margin,
        plain_missed=plain_missed,
        without=None if without is None else tuple(without),
        covariance=None if covariance is None else Covariance(covariance),
        top_k=top_k,
        batch=batch,
    )
    try:
        fit = open_fit(model, data, work, settings, dtype=getattr(torch, dtype), device_map=device_map, say=typer.echo)
        saved = fit_control(fit, bundle, name=name, version=version, until=Stage(stage))
    except TrimtabError as error:
        typer.echo(f"trimtab fit control: {error}", err=True)
        raise typer.Exit(1) from error
    if saved is None:
        typer.echo(f"stopped after {stage}; its files are in {work}")
    else:
        typer.echo(f"wrote {saved.label} to {bundle}: {', '.join(profile.name for profile in saved.manifest.profiles)}")
