"""Stages `answers` and `judged`: sampled answers and residuals of every prompt, and the refusal confidence they give.

Answers lie in parts of some hundred prompts, so that a run that was cut off goes on after the last part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.engine.asks import Ask
from steering.engine.options import CaptureSettings
from steering.evaluate.confidence import REPORT_BANDS, answer_logprob, label, score
from steering.evaluate.judge import Verdict
from steering.fit.captured import CapturedShards
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_fit import FIRST_TOKENS, Case, Engine, Residuals, TopicFit
from steering.fit.topic_prompts import Role, TopicPrompt, TopicPrompts

PART = 256
"""Prompts of one part."""
LONGEST_FIXED = 256
"""Tokens of a fixed answer at most: log-probabilities of more tell little and cost as much."""
END_OF_REASONING = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """An answered conversation whose log-probability is compared with and without an edit.

    Attributes:
        row: of its prompt, in `Measured`.
        tokens: of the answer, reasoning included.
    """

    row: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Prompts with their confidences and residuals; rows are in the order they were asked.

    Attributes:
        items: one prompt a row.
        confidence: [N] float64, nan where there is none: neutral prompts, and those that no answer was judged of.
        fixed: answered conversations on calibration prompts, for the shift.
        thinks: answers begin with reasoning.
        facts: the results of both stages.
    """

    items: tuple[TopicPrompt, ...]
    confidence: Tensor
    fixed: tuple[Fixed, ...]
    residuals: Residuals
    thinks: bool
    facts: Sequence[Result]

    def rows(self, roles: Iterable[Role], uses: Iterable[Use], *, is_judged: bool = True) -> list[int]:
        """Rows of these roles and uses; with `is_judged` those that have a confidence."""
        roles, uses = set(roles), set(uses)
        return [
            row
            for row, one in enumerate(self.items)
            if one.role in roles and one.use in uses and (not is_judged or not math.isnan(float(self.confidence[row])))
        ]

    @property
    def names(self) -> list[str]:
        """Keys of the prompts, by row."""
        return [one.key for one in self.items]


def measured(fit: TopicFit, prompts: TopicPrompts, prompt_facts: Result) -> Measured:
    """Run or read both stages."""
    folder = fit.work / "answers"
    answers = fit.stage(
        "answers",
        lambda: _answers(fit, prompts, folder, str(prompt_facts["digest"])),
        of=("samples", "temperature", "max_tokens", "longest"),
        after=[prompt_facts],
    )
    items = tuple(prompts.items[index] for index in answers["kept"])
    parts = [json.loads((folder / name).read_text("utf-8")) for name in answers["parts"]]
    samples = [one for part in parts for one in part["samples"]]
    judged = fit.stage(
        "judged",
        lambda: _judged(fit, items, samples),
        of=("tau", "band"),
        after=[answers],
        given={"judge": fit.judge_facts},
    )
    confidence = torch.tensor(
        [math.nan if value is None else value for value in judged["confidence"]], dtype=torch.float64
    )
    # Cut short, a thinking model's answer would be all reasoning.
    longest = None if answers["thinks"] else LONGEST_FIXED
    fixed = tuple(Fixed(row=row, tokens=tuple(samples[row][best]["tokens"][:longest])) for row, best in judged["fixed"])
    return Measured(
        items=items,
        confidence=confidence,
        fixed=fixed,
        residuals=CapturedShards(fit.work / answers["folder"], count=len(items)),
        thinks=bool(answers["thinks"]),
        facts=(answers, judged),
    )


def end_of_reasoning(engine: Engine) -> tuple[int, ...]:
    """Token ids of the mark that ends a reasoning trace."""
    return tuple(engine.tokenizer.encode(END_OF_REASONING, add_special_tokens=False))


def reasoning_end(answers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where a thinking model's reasoning ends, as a manifest has it; None for one that does not think.

    Args:
        answers: what the stage of that name found.
    """
    end = answers.get("end_of_reasoning", [])
    return {"token": END_OF_REASONING, "token_id": end[0]} if len(end) == 1 else None


def segment_logprob(
    logprobs: Sequence[float], tokens: Sequence[int], end: Sequence[int], *, thinks: bool
) -> float | None:
    """Mean log-probability of the answer without its reasoning; None where the reasoning did not end.

    A model whose template does not begin a trace may still write one.
    """
    found = answer_logprob(logprobs, tokens, end) if end else None
    if found is None and not thinks and not _holds(tokens, end):
        found = answer_logprob(logprobs)
    return found


def _holds(tokens: Sequence[int], end: Sequence[int]) -> bool:
    size = len(end)
    return bool(size) and any(tuple(tokens[at : at + size]) == tuple(end) for at in range(len(tokens) - size + 1))


def _answers(fit: TopicFit, prompts: TopicPrompts, folder: Path, digest: str) -> Result:
    settings = fit.settings
    names = [str(settings.samples), str(settings.temperature), str(settings.max_tokens), str(settings.longest)]
    names += [str(settings.seed), json.dumps(fit.fingerprint, sort_keys=True)]
    identity = hashlib.sha256(" ".join([digest, *names]).encode()).hexdigest()[:12]
    captured = fit.work / f"captured-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    with fit.session(capture=CaptureSettings(folder=captured)) as session:
        engine = session.engine
        thinks = _opens_reasoning(engine)
        end = end_of_reasoning(engine)
        ids = fit.prompt_ids(engine, [one.text for one in prompts.items])
        kept = [index for index, tokens in enumerate(ids) if len(tokens) <= settings.longest]
        asks = [_ask(fit, prompts.items[index], ids[index]) for index in kept]
        parts = []
        for number, start in enumerate(range(0, len(kept), PART)):
            path = folder / f"{identity}-{number:05d}.json"
            parts.append(path.name)
            chosen = asks[start : start + PART]
            if path.is_file():
                # Residuals that a crash lost are made again here; those on disk are not.
                engine.capture(chosen)
                continue
            found = engine.ask(chosen)
            samples = [
                [
                    {
                        "text": sample.text,
                        "first": list(sample.tokens[:FIRST_TOKENS]),
                        "tokens": list(sample.tokens) if _is_fixed(prompts.items[index]) else [],
                        "logprob": segment_logprob(sample.logprobs, sample.tokens, end, thinks=thinks),
                        "finish": sample.finish,
                        "probability": None if answer.response is None else answer.response[place],
                    }
                    for place, sample in enumerate(answer.samples)
                ]
                for index, answer in zip(kept[start : start + PART], found, strict=True)
            ]
            fresh = path.with_suffix(".part")
            fresh.write_text(json.dumps({"samples": samples}, ensure_ascii=False), "utf-8")
            fresh.replace(path)
            fit.say(f"  answers: {start + len(chosen)} of {len(kept)} prompts")
        engine.captured()
    lengths = [len(ids[index]) for index in kept]
    return {
        "kept": kept,
        "too_long": len(ids) - len(kept),
        "thinks": thinks,
        "end_of_reasoning": list(end) if thinks else [],
        "parts": parts,
        "folder": captured.name,
        "contents": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in parts],
        "prompt_tokens": {"mean": sum(lengths) / max(1, len(lengths)), "most": max(lengths, default=0)},
    }


def _ask(fit: TopicFit, prompt: TopicPrompt, ids: tuple[int, ...]) -> Ask:
    settings = fit.settings
    if prompt.role is Role.NEUTRAL:
        return Ask(prompt=ids, max_tokens=1, capture=True)
    # Of the prompt and not of its place, so that other prompts in the batch do not change its answers.
    seed = int(hashlib.sha256(f"{settings.seed}/{prompt.key}".encode()).hexdigest()[:7], 16)
    return Ask(
        prompt=ids,
        samples=settings.samples,
        temperature=settings.temperature,
        seed=seed,
        max_tokens=settings.max_tokens,
        capture=True,
    )


def _is_fixed(prompt: TopicPrompt) -> bool:
    return prompt.role is Role.ANSWERED and prompt.use is Use.CALIBRATE


def _opens_reasoning(engine: Engine) -> bool:
    """Whether the chat template itself begins a reasoning trace."""
    ids = engine.chat([{"role": "user", "content": "Hello"}])
    return str(engine.tokenizer.decode(list(ids[-8:]))).rstrip().endswith("<think>")


def _judged(fit: TopicFit, items: Sequence[TopicPrompt], samples: Sequence[Sequence[dict[str, Any]]]) -> Result:
    asked = [row for row, one in enumerate(items) if one.role is not Role.NEUTRAL]
    cases = [
        Case(
            prompt=items[row].text,
            text=sample["text"],
            tokens=tuple(sample["first"]),
            probability=sample["probability"],
        )
        for row in asked
        for sample in samples[row]
    ]
    verdicts = iter(fit.judged(cases))
    confidence: list[float | None] = [None] * len(items)
    fixed: list[tuple[int, int]] = []
    counted: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    unfinished = 0
    for row in asked:
        told = [next(verdicts) for _ in samples[row]]
        counted.update(one.verdict for one in told)
        kinds.update(one.kind for one in told if one.kind is not None)
        known = [
            (label(one.verdict), sample["logprob"], place)
            for place, (one, sample) in enumerate(zip(told, samples[row], strict=True))
            if sample["logprob"] is not None
        ]
        unfinished += len(told) - len(known)
        if not known:
            continue
        found = score([one[0] for one in known], [one[1] for one in known], fit.settings.tau)
        if not found.is_known:
            continue
        confidence[row] = found.confidence
        answered = [one for one in known if one[0] == -1]
        if _is_fixed(items[row]) and answered and found.confidence < -fit.settings.band:
            fixed.append((row, max(answered, key=lambda one: one[1])[2]))
    return {
        "judge": fit.judge.name,
        "confidence": confidence,
        "fixed": fixed,
        "verdicts": {verdict.value: counted[verdict] for verdict in Verdict},
        "kinds": dict(sorted(kinds.items())),
        "unfinished": unfinished,
        "unjudged": sum(confidence[row] is None for row in asked),
        "rates": _rates(items, confidence, fit.settings.band),
        "counts": getattr(getattr(fit.judge, "counts", None), "to_json", dict)(),
    }


def _rates(
    items: Sequence[TopicPrompt], confidence: Sequence[float | None], band: float
) -> dict[str, dict[str, dict[str, float | int]]]:
    """By role and use: how many are refused under each band, and the mean confidence."""
    found: dict[str, dict[str, list[float]]] = {}
    for one, value in zip(items, confidence, strict=True):
        if value is not None:
            found.setdefault(one.role, {}).setdefault(one.use, []).append(value)
    return {
        role: {
            use: {
                "n": len(values),
                "mean": sum(values) / len(values),
                "neutral": sum(abs(value) <= band for value in values),
                **{f"refused beyond {edge:g}": sum(value > edge for value in values) for edge in REPORT_BANDS},
            }
            for use, values in by_use.items()
        }
        for role, by_use in found.items()
    }
