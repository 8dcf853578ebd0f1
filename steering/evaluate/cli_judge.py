"""`trimtab judge`: measure judges of refusal against human labels."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steering.evaluate.llm_judge import LlmSettings

app = typer.Typer(help="Measure judges of refusal against human labels.", no_args_is_help=True)


class JudgeName(StrEnum):
    """Judges of texts, the two that came with the data set, and a bundle's response probe.

    The judge `token` is not among them: it reads the token with which the model's own answers begin, and these are
    other models'.
    """

    KEYWORD = "keyword"
    LLM = "llm"
    PROBE = "probe"
    XSTEST_STRINGS = "xstest-strings"
    XSTEST_GPT4 = "xstest-gpt4"


@app.callback()
def main() -> None:
    """Measure judges of refusal against human labels."""


@app.command()
def calibrate(
    judge: Annotated[JudgeName, typer.Option(help="Judge to measure.")] = JudgeName.KEYWORD,
    data: Annotated[Path | None, typer.Option(help="Data directory; else $TRIMTAB_DATA, else a cache.")] = None,
    most: Annotated[int | None, typer.Option(help="Completions at most, evenly spaced; all 2,250.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Results as JSON.")] = None,
    *,
    judge_url: Annotated[str | None, typer.Option(help="Root of an OpenAI-compatible API, such as .../v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="File of verdicts that are not asked again; else in the user's cache.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 16,
    temperature: Annotated[float, typer.Option(help="Of the model judge.", min=0.0)] = 0.0,
    price_prompt: Annotated[float | None, typer.Option(help="Of a million prompt tokens.", min=0.0)] = None,
    price_completion: Annotated[float | None, typer.Option(help="Of a million completion tokens.", min=0.0)] = None,
    model: Annotated[Path | None, typer.Option(help="Local model folder, for probe.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Its bundle with a response probe, for probe.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of XSTest's automated_evaluation_labels, for xstest-gpt4.")
    ] = None,
) -> None:
    """Score a judge on the human-labelled completions of XSTest: confusion, accuracy, kappa, precision and recall.

    The key of a model judge comes from TRIMTAB_JUDGE_API_KEY.
    """
    import json

    from steering.errors import InvalidSpec, TrimtabError
    from steering.evaluate.calibration import (
        KEYWORD_CAVEAT,
        LABELS,
        PROBE_CAVEAT,
        as_label,
        calibration,
        labelled_completions,
        table,
    )
    from steering.evaluate.judge import Judge, open_judge
    from steering.evaluate.published import StringMatchJudge, gpt4_labels
    from steering.fit.datasets import DataDirectory

    try:
        records = labelled_completions(DataDirectory.resolve(data), most)
        extra: dict[str, Any] = {}
        if judge is JudgeName.XSTEST_GPT4:
            if labels is None:
                raise InvalidSpec("the judge xstest-gpt4 is a set of files: give their folder with --labels")
            known = gpt4_labels(labels, records, LABELS)
            records, said = [record for record, _ in known], [label for _, label in known]
        else:
            used: Judge
            if judge is JudgeName.XSTEST_STRINGS:
                used = StringMatchJudge()
            elif judge is JudgeName.LLM:
                used = open_judge(
                    "llm",
                    llm=llm_settings(
                        judge_url,
                        judge_model,
                        cache,
                        concurrency=concurrency,
                        temperature=temperature,
                        prices=(price_prompt, price_completion),
                    ),
                )
            else:
                used = open_judge(judge.value)
            pairs = [(record.prompt, record.answer or "") for record in records]
            evidence = None
            if judge is JudgeName.PROBE:
                evidence = _read_by_probe(model, bundle, pairs)
                extra["caveat"] = PROBE_CAVEAT
            said = _asked(used, pairs, as_label, evidence)
            if judge is JudgeName.KEYWORD:
                extra["caveat"] = KEYWORD_CAVEAT
            facts_of = getattr(used, "facts", None)
            if facts_of is not None:
                extra["judge"] = facts_of()
        found = {**calibration(records, said), **extra}
    except TrimtabError as error:
        typer.echo(f"trimtab judge calibrate: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(table(found, judge.value))
    if "judge" in found:
        typer.echo("\n" + ", ".join(f"{name} {value:,}" for name, value in found["judge"]["counts"].items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"name": judge.value, **found}, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {out}")


def llm_settings(
    url: str | None,
    model: str | None,
    cache: Path | None,
    *,
    concurrency: int = 16,
    temperature: float = 0.0,
    prices: tuple[float | None, float | None] = (None, None),
) -> LlmSettings:
    """Settings of a model judge from options; the key from the environment.

    Raises:
        InvalidSpec: one of two options that go together is missing.
    """
    import os

    from platformdirs import user_cache_path

    from steering.errors import InvalidSpec
    from steering.evaluate.llm_judge import LlmSettings, Prices

    if url is None or model is None:
        raise InvalidSpec("a model judge needs an endpoint: --judge-url and --judge-model go together")
    prompt, completion = prices
    if (prompt is None) != (completion is None):
        raise InvalidSpec("--price-prompt and --price-completion go together")
    return LlmSettings(
        url=url,
        model=model,
        cache=cache or user_cache_path("trimtab") / "judge" / "verdicts.jsonl",
        key=os.environ.get("TRIMTAB_JUDGE_API_KEY", "unused"),
        concurrency=concurrency,
        temperature=temperature,
        prices=None if prompt is None or completion is None else Prices(prompt=prompt, completion=completion),
    )


def _read_by_probe(model: Path | None, bundle: Path | None, pairs: list[tuple[str, str]]) -> list[Any]:
    from tqdm import tqdm

    from steering.errors import InvalidSpec
    from steering.evaluate.given import read_by_probe

    if model is None or bundle is None:
        raise InvalidSpec("the judge probe is part of a bundle, read in the engine: give --model and --bundle")
    with tqdm(total=len(pairs), desc="reading", unit="", disable=None) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        return read_by_probe(model, bundle, pairs, show)


def _asked(judge: Any, pairs: list[tuple[str, str]], as_label: Any, evidence: list[Any] | None) -> list[str]:
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=judge.name, unit="", disable=None) as bar:
        return [as_label(one.verdict) for one in judge.judge(pairs, bar.update, evidence=evidence)]
