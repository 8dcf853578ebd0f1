"""`trimtab fit`: fit edits on a model and write its bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Fit directions and doses on a model and write its bundle.", no_args_is_help=True)


class Stage(StrEnum):
    """How far `trimtab fit control` goes."""

    DIRECTIONS = "directions"


@app.callback()
def main() -> None:
    """Fit directions and doses on a model and write its bundle."""


@app.command()
def control(
    stage: Annotated[Stage, typer.Option(help="Last stage to run.")] = Stage.DIRECTIONS,
    model: Annotated[Path, typer.Option(help="Folder of a model with refusal tokens.")] = Path("artifacts/demo/model"),
    bundle: Annotated[Path, typer.Option(help="Folder the bundle is written to.")] = Path("artifacts/demo/bundle"),
    data: Annotated[Path | None, typer.Option(help="Data directory; else $TRIMTAB_DATA, else a cache.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of stage results; else <user cache>/trimtab/fit.")] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle.")] = "trimtab-demo",
    version: Annotated[str, typer.Option(help="Version of the bundle.")] = "1",
    *,
    top_k: Annotated[int | None, typer.Option(help="Coordinates a direction keeps; 200 unless told.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """P1: categorical directions from refusal tokens, their layer, doses and certified strengths."""
    import torch

    from steering.errors import TrimtabError
    from steering.fit.control import Settings, open_fit
    from steering.fit.control_bundle import fit_directions

    torch.set_num_threads(threads)
    if work is None:
        from platformdirs import user_cache_path

        work = user_cache_path("trimtab") / "fit" / name
    try:
        fit = open_fit(model, data, work, Settings(top_k=top_k), say=typer.echo)
        saved = fit_directions(fit, bundle, name=name, version=version)
    except TrimtabError as error:
        typer.echo(f"trimtab fit {stage}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {saved.label} to {bundle}: {', '.join(saved.edits)}")
