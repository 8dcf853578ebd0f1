"""`trimtab eval`: measure refusal, over-refusal, attacks and ability through a served API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from steering.fit.cli import DtypeName

app = typer.Typer(help="Measure refusal through a served API.", no_args_is_help=True)

Url = Annotated[str, typer.Option(help="Root of a served API.")]
ArmOption = Annotated[
    list[str] | None,
    typer.Option("--arm", help='An arm of your own, name={"mode": ...} as the steering field; repeatable.'),
]


@app.callback()
def main() -> None:
    """Measure refusal through a served API."""


@app.command()
def run(
    url: Url = "http://127.0.0.1:8000",
    out: Annotated[Path, typer.Option(help="Folder of the answers, report.json and report.html.")] = Path(
        "trimtab-eval"
    ),
    suite: Annotated[list[str] | None, typer.Option(help="Suite; repeatable. All, or none beside --prompts.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Prompts of your own as one more suite, NAME=FILE; repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Arm to ask; repeatable. All by default.")] = None,
    arm: ArmOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data directory; else $TRIMTAB_DATA, else a cache.")
    ] = None,
    most: Annotated[int, typer.Option(help="Prompts of a suite at most, evenly spaced.", min=1)] = 150,
    all_prompts: Annotated[bool, typer.Option("--all-prompts", help="Every prompt of every suite.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 24,
    texts: Annotated[
        int,
        typer.Option(
            help="Whole answers of a suite under arms beside unsteered, auto and CAST; the others are decided by their "
            "first token. For models with refusal tokens; all with --all-prompts.",
            min=0,
        ),
    ] = 10,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 48,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the served bundle: token ids, provenance, pictures of the fit.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the served model: CAST's condition, loss of reference answers.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="Thresholds of the curve, comply_below:refuse_above; repeatable.")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of that model's weights in memory.")] = DtypeName.FLOAT32,
    device_map: Annotated[str | None, typer.Option(help="Of that model, as transformers takes it.")] = None,
    refusal_wordings: Annotated[
        Path | None,
        typer.Option(help="File of sentences with which this model refuses, one a line: a judge of the text."),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="Root of an OpenAI-compatible API of a model judge.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    judge_concurrency: Annotated[int, typer.Option(help="Requests to it at once.", min=1)] = 16,
) -> None:
    """Ask every suite under every arm, judge, and write a report; goes on where an earlier run stopped.

    Keys come from TRIMTAB_API_KEY and TRIMTAB_JUDGE_API_KEY.
    """
    import asyncio
    import os

    from openai import AsyncOpenAI
    from tqdm import tqdm

    from steering.errors import TrimtabError
    from steering.evaluate.arms import SWEEP, arm_from_option, pair_from_option
    from steering.evaluate.cli_judge import llm_settings
    from steering.evaluate.evaluation import Order, evaluate
    from steering.evaluate.llm_judge import LlmJudge
    from steering.evaluate.report import summary
    from steering.evaluate.run import Settings
    from steering.evaluate.suites import SUITES, find_suite, suite_from_option
    from steering.evaluate.wordings import Wordings
    from steering.fit.datasets import DataDirectory

    bars: list[Any] = []

    def progress(title: str, total: int) -> Callable[[int], object]:
        bar = tqdm(total=total, desc=title, unit="", smoothing=0.05)
        bars.append(bar)
        return bar.update

    async def go(order: Order) -> dict[str, object]:
        key = os.environ.get("TRIMTAB_API_KEY", "unused")
        async with AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key, max_retries=5) as client:
            return await evaluate(client, order, progress, typer.echo)

    try:
        judge = None
        if judge_url is not None or judge_model is not None:
            kept = out / "judgements.jsonl"
            judge = LlmJudge(llm_settings(judge_url, judge_model, kept, concurrency=judge_concurrency), say=typer.echo)
        order = Order(
            data=DataDirectory.resolve(data),
            suites=[
                *(find_suite(name) for name in suite or ([] if prompts else SUITES)),
                *(suite_from_option(text) for text in prompts or ()),
            ],
            most=None if all_prompts else most,
            out=out,
            settings=Settings(max_tokens=max_tokens, texts=None if all_prompts else texts, concurrency=concurrency),
            bundle=bundle,
            model=model,
            dtype=dtype.value,
            device_map=device_map,
            extra=[arm_from_option(text) for text in arm or ()],
            only=only,
            sweep=[pair_from_option(text) for text in sweep] if sweep else SWEEP,
            judge=judge,
            wordings=None if refusal_wordings is None else Wordings.read(refusal_wordings),
        )
        report = asyncio.run(go(order))
    except TrimtabError as error:
        typer.echo(f"trimtab eval run: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        for bar in bars:
            bar.close()
    typer.echo(summary(report))
    typer.echo(f"wrote {out / 'report.json'} and {out / 'report.html'}")


@app.command()
def page(
    report: Annotated[Path, typer.Argument(help="report.json of a run.")],
    out: Annotated[Path | None, typer.Option(help="The page; else report.html beside it.")] = None,
) -> None:
    """Draw the page of a report again; nothing is asked or measured."""
    import json

    from steering.evaluate.page import write_page

    if not report.is_file():
        typer.echo(f"trimtab eval page: no report at {report}", err=True)
        raise typer.Exit(1)
    path = out or report.with_suffix(".html")
    write_page(json.loads(report.read_text(encoding="utf-8")), path)
    typer.echo(f"wrote {path}")


@app.command()
def ability(
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Name of the served model.")] = "trimtab-demo",
    tasks: Annotated[
        str, typer.Option(help="Of gsm8k, ifeval, humaneval, mmlu; separated by commas.")
    ] = "gsm8k,ifeval",
    arm: ArmOption = None,
    limit: Annotated[int | None, typer.Option(help="Questions of a task at most.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 16,
    run_code: Annotated[bool, typer.Option("--run-code", help="Allow tasks that run the model's code here.")] = False,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder of the harness's task files that go before its own, such as a task over local data."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Results as JSON.")] = Path("trimtab-ability.json"),
) -> None:
    """General benchmarks by lm-evaluation-harness, unsteered and under auto; an optional package.

    The key comes from TRIMTAB_API_KEY.
    """
    import json
    import os

    from steering.errors import TrimtabError
    from steering.evaluate.arms import arm_from_option
    from steering.evaluate.harness import benchmark

    try:
        arms = {one.name: one.steering for one in map(arm_from_option, arm or ())}
        found = benchmark(
            url=url,
            model=model,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            arms=arms or {"unsteered": {"mode": "off"}, "auto": {"mode": "auto"}},
            limit=limit,
            concurrency=concurrency,
            allows_code=run_code,
            include=include_path,
            key=os.environ.get("TRIMTAB_API_KEY"),
        )
    except TrimtabError as error:
        typer.echo(f"trimtab eval ability: {error}", err=True)
        raise typer.Exit(1) from error
    out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    typer.echo(f"wrote {out}")
