"""`trimtab fit topics`: remove or induce the refusal of a topic, from lists of prompts and a judge."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steering.bundle import Bundle
    from steering.evaluate.judge import Judge


class TopicStageName(StrEnum):
    """The stages of `trimtab fit topics`, in order; the same as `steering.fit.topics.TopicStage`."""

    PROMPTS = "prompts"
    ANSWERS = "answers"
    JUDGED = "judged"
    VECTORS = "vectors"
    LAYERS = "layers"
    GATE = "gate"
    CANDIDATES = "candidates"
    FINDER = "finder"
    COMPARE = "compare"
    INDUCTION = "induction"
    RANGES = "ranges"
    ANALYSIS = "analysis"
    BUNDLE = "bundle"


class TopicPresetName(StrEnum):
    """`auto` searches; the others take rows of Table 1 of arXiv 2512.16602."""

    AUTO = "auto"
    PAPER_CHINA = "paper-china"
    PAPER_EXTENDED = "paper-extended"


class PurposeName(StrEnum):
    """What is to become of the topic's refusals."""

    REMOVE = "remove"
    INDUCE = "induce"
    BOTH = "both"


class TopicScopeName(StrEnum):
    """Positions that ungated edits reach; a gate's begin at the last prompt token."""

    ALL = "all"
    GENERATED = "generated"


class TopicReasoningName(StrEnum):
    """What edits do with the reasoning of a thinking model."""

    EDITED = "edited"
    SPARED = "spared"


class JudgeName(StrEnum):
    """Who says whether an answer refuses."""

    KEYWORD = "keyword"
    TOKEN = "token"  # noqa: S105 - a judge's name
    PROBE = "probe"
    LLM = "llm"


class RidgeName(StrEnum):
    """What lambda is measured in."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"
    LEDOIT_WOLF = "ledoit-wolf"


Prompts = Annotated[
    list[str] | None,
    typer.Option(help="File of prompts (text, JSONL, JSON, CSV) or <set>/<part> of the registry; repeatable."),
]


def topics(
    refused: Prompts = None,
    answered: Prompts = None,
    safety: Annotated[
        list[str] | None, typer.Option(help="Harmful prompts whose refusal is to stand; for the gate. Repeatable.")
    ] = None,
    neutral: Annotated[
        list[str] | None, typer.Option(help="Prompts that say where the neutral point lies. Repeatable.")
    ] = None,
    induced: Annotated[
        list[str] | None, typer.Option(help="Prompts that --purpose induce is to have refused. Repeatable.")
    ] = None,
    *,
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("artifacts/demo/model"),
    bundle: Annotated[Path, typer.Option(help="Folder the bundle is written to.")] = Path("topics-bundle"),
    work: Annotated[Path | None, typer.Option(help="Folder of stage results; else <user cache>/trimtab/fit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data directory; else $TRIMTAB_DATA, else a cache.")] = None,
    name: Annotated[str, typer.Option(help="Name of the bundle.")] = "topics",
    version: Annotated[str, typer.Option(help="Version of the bundle.")] = "1",
    topic: Annotated[str, typer.Option(help="What the topic is called in the bundle.")] = "Topic",
    judge: Annotated[JudgeName, typer.Option(help="Who says whether an answer refuses.")] = JudgeName.KEYWORD,
    judge_url: Annotated[str | None, typer.Option(help="OpenAI-compatible API of the judge llm.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    judge_bundle: Annotated[
        Path | None, typer.Option(help="Bundle of the model whose response probe is the judge probe.")
    ] = None,
    purpose: Annotated[PurposeName, typer.Option(help="Remove refusals, induce them, or both.")] = PurposeName.REMOVE,
    scope: Annotated[TopicScopeName | None, typer.Option(help="Positions ungated edits reach; all.")] = None,
    reasoning: Annotated[
        TopicReasoningName | None, typer.Option(help="Of a thinking model: edited, or spared until the answer; edited.")
    ] = None,
    preset: Annotated[TopicPresetName, typer.Option(help="Where constants come from.")] = TopicPresetName.AUTO,
    paper_model: Annotated[
        str | None, typer.Option(help="The paper's model, where the folder has another name.")
    ] = None,
    stage: Annotated[TopicStageName, typer.Option(help="Last stage to run.")] = TopicStageName.BUNDLE,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt; 5.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, reasoning included; 256.", min=1)] = None,
    band: Annotated[float | None, typer.Option(help="Half-width of the neutral band; 0.15.", min=0.0, max=1.0)] = None,
    method: Annotated[list[str] | None, typer.Option(help="Of md, wmd, rmd, wrmd; repeatable. All by default.")] = None,
    ridge: Annotated[RidgeName | None, typer.Option(help="Lambda of RMD and WRMD; ledoit-wolf.")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="Lambda of the other kinds; 0.01.", min=0.0)] = None,
    literal: Annotated[
        bool | None, typer.Option("--literal/--centred", help="Eq. 4 as printed, or a centred covariance.")
    ] = None,
    removal: Annotated[
        float | None, typer.Option(help="Share of the confidence to remove; 0.75.", min=0.0, max=1.0)
    ] = None,
    safety_margin: Annotated[
        float | None, typer.Option(help="Share of harmful prompts that may be refused less; 0.", min=0.0, max=1.0)
    ] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Fit a gate, and compare with and without.")] = True,
    most: Annotated[int | None, typer.Option(help="Prompts of one source at most; 1500.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts: to try it out, not to use the bundle.")] = False,
    engine: Annotated[list[str] | None, typer.Option(help="vLLM's own option, name=value as JSON; repeatable.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Refusal steering of arXiv 2512.16602: vectors from judged answers, layers, doses, a gate, and a bundle.

    A judge's key comes from TRIMTAB_JUDGE_API_KEY.
    """
    import torch

    from steering.errors import TrimtabError
    from steering.fingerprint import fingerprint_of
    from steering.fit.datasets import DataDirectory
    from steering.fit.ridge import Ridge, RidgeKind
    from steering.fit.topic_fit import TopicFit
    from steering.fit.topic_prompts import Role
    from steering.fit.topic_settings import QUICK, Purpose, TopicPreset, TopicSettings, topic_settings
    from steering.fit.topics import TopicStage, fit_topics
    from steering.plan import Reasoning, Scope

    torch.set_num_threads(threads)
    if work is None:
        from platformdirs import user_cache_path

        work = user_cache_path("trimtab") / "fit" / name
    sources = {
        Role.REFUSED: refused or [],
        Role.ANSWERED: answered or [],
        Role.SAFETY: safety or [],
        Role.NEUTRAL: neutral or [],
        Role.INDUCED: induced or [],
    }
    try:
        defaults = TopicSettings().ridge
        kind = None if ridge is None else RidgeKind(ridge)
        settings = topic_settings(
            TopicPreset(preset),
            model=paper_model or model.resolve().name,
            fingerprint=fingerprint_of(model).model_dump(mode="json"),
            **({**QUICK} if quick else {}),
            category=topic,
            purpose=Purpose(purpose),
            has_gate=gate,
        )
        chosen: dict[str, Any] = {
            "scope": None if scope is None else Scope(scope),
            "reasoning": None if reasoning is None else Reasoning(reasoning),
            "samples": samples,
            "max_tokens": max_tokens,
            "band": band,
            "methods": _methods(method),
            "is_literal": literal,
            "removal": removal,
            "safety_margin": safety_margin,
            "most": most,
            "ridge": None
            if kind is None and lambda_ is None
            else Ridge(kind=kind or defaults.kind, value=defaults.value if lambda_ is None else lambda_),
        }
        settings = _replaced(settings, chosen)
        refusals, respond = _refusal_tokens(model)
        judging = _judging(judge, judge_bundle)
        opened, facts = _judge(judge, judge_url, judge_model, work, refusals, respond)
        if judging is not None:
            facts["bundle"] = judging.digest
        fit = TopicFit(
            model=model,
            work=work,
            settings=settings,
            judge=opened,
            open_engine=_opener(model, engine or []),
            judge_facts=facts,
            refusal_tokens={category: token for token, category in refusals.items()},
            respond=respond,
            judging=judging,
            say=typer.echo,
        )
        saved = fit_topics(
            fit, sources, DataDirectory.resolve(data), bundle, name=name, version=version, until=TopicStage(stage)
        )
    except TrimtabError as error:
        typer.echo(f"trimtab fit topics: {error}", err=True)
        raise typer.Exit(1) from error
    if saved is None:
        typer.echo(f"stopped after {stage}; its files are in {work}")
    else:
        typer.echo(f"wrote {saved.label} to {bundle}: {', '.join(one.name for one in saved.manifest.profiles)}")


def _replaced(settings: Any, chosen: dict[str, Any]) -> Any:
    from dataclasses import replace

    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})


def _methods(names: list[str] | None) -> tuple[Any, ...] | None:
    from steering.errors import FitError
    from steering.fit.topic_directions import Method

    if not names:
        return None
    unknown = sorted(set(names) - {method.value for method in Method})
    if unknown:
        raise FitError(f"no method {unknown}; methods: {', '.join(Method)}")
    return tuple(dict.fromkeys(Method(name) for name in names))


def _refusal_tokens(model: Path) -> tuple[dict[int, str], int | None]:
    """Categories by the id of their token, and the id of `[respond]`, where the model has such tokens."""
    from transformers import AutoTokenizer

    from steering.errors import OperatorError
    from steering.fit.categories import CATEGORIES

    try:
        vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    except (OSError, ValueError) as error:
        raise OperatorError(f"no tokenizer in {model}: {error}; give a local model folder") from error
    found = {vocabulary[f"[{name}]"]: name for name in CATEGORIES if f"[{name}]" in vocabulary}
    return found, vocabulary.get("[respond]")


def _judge(
    name: str, url: str | None, model: str | None, work: Path, refusals: dict[int, str], respond: int | None
) -> tuple[Judge, dict[str, Any]]:
    """The judge, and what its verdicts depend on."""
    import os

    from steering.errors import OperatorError
    from steering.evaluate.judge import open_judge

    if (url is None) != (model is None) or (name == JudgeName.LLM) != (url is not None):
        raise OperatorError("--judge llm, --judge-url and --judge-model go together")
    if url is None or model is None:
        return open_judge(name, refusals=refusals, respond=respond), {"name": str(name)}
    from steering.evaluate.llm_judge import LlmSettings

    settings = LlmSettings(
        url=url,
        model=model,
        cache=work / "judge.jsonl",
        key=os.environ.get("TRIMTAB_JUDGE_API_KEY", "unused"),
    )
    return open_judge(name, llm=settings), {"name": str(name), "model": model}


def _judging(name: str, path: Path | None) -> Bundle | None:
    """The bundle whose response probe judges."""
    from steering.bundle import load_bundle
    from steering.errors import OperatorError

    if (path is None) != (name != JudgeName.PROBE):
        raise OperatorError("--judge probe and --judge-bundle go together")
    if path is None:
        return None
    found = load_bundle(path)
    if found.manifest.response is None:
        raise OperatorError(f"bundle {found.label} has no response probe to judge with")
    return found


def _opener(model: Path, options: list[str]) -> Any:
    import json

    from steering.errors import FitError

    given: dict[str, Any] = {}
    for text in options:
        key, separator, value = text.partition("=")
        try:
            given[key] = json.loads(value)
        except ValueError as error:
            raise FitError(f"--engine {text!r}: after '=' comes a value as JSON: {error}") from error
        if not separator or not key:
            raise FitError(f"--engine must be name=value, got {text!r}")

    def start(*, bundles: Any = (), capture: Any = None) -> Any:
        from steering.engine.offline import OfflineEngine

        return OfflineEngine(model, bundles=bundles, capture=capture, options=given)

    return start
