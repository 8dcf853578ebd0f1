"""`trimtab eval`: measure refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure refusal.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure refusal."""


@app.command()
def served(
    url: Annotated[str, typer.Option(help="Root of a served API.")] = "http://127.0.0.1:8000",
    suite: Annotated[list[str] | None, typer.Option(help="Suite; repeatable. All by default.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data directory; else $TRIMTAB_DATA, else a cache.")
    ] = None,
    most: Annotated[int | None, typer.Option(help="Prompts of a suite at most, evenly spaced.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    controls: Annotated[bool, typer.Option(help="Ask under the bundle's random control, too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
) -> None:
    """Refusal rates of held prompts over a served API, unsteered, refuse, comply and a random control."""
    import asyncio
    import json

    from openai import AsyncOpenAI
    from tqdm import tqdm

    from steering.evaluate.served import ARMS, measure, table
    from steering.evaluate.suites import SUITES, find_suite
    from steering.fit.datasets import DataDirectory

    directory = DataDirectory.resolve(data)
    chosen = [find_suite(name) for name in suite or SUITES]
    prompts = {entry.name: entry.prompts(directory, most) for entry in chosen}
    arms = [arm for arm in ARMS if controls or arm.profile is None]

    async def run() -> dict[str, object]:
        total = len(arms) * sum(map(len, prompts.values()))
        async with AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="unused") as client:
            with tqdm(total=total, unit="answer") as bar:
                return await measure(client, prompts, arms, concurrency=concurrency, on_progress=bar.update)

    report = asyncio.run(run())
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
