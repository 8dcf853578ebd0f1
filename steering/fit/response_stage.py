"""Stage `response`: the model's own greedy answers, unsteered and steered, and the probe that tells which refuse.

A model with refusal tokens labels its answers itself by the first token; any other is labelled by the keyword judge on
the text of greedy answers. Knows nothing of bundles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from steering.errors import TooFewPrompts
from steering.evaluate.judge import KeywordJudge, Verdict
from steering.fit.activations import LoadedModel, greedy
from steering.fit.control import Fit
from steering.fit.datasets import thinned
from steering.fit.generated import write_generated
from steering.fit.intervals import Rate
from steering.fit.openings import Openings
from steering.fit.prompts import Kind, Prompts
from steering.fit.response import MOST_TOKENS, ResponseProbe, fit_response_probe
from steering.gate import Probe
from steering.terms import Edit

RESPONSE = "response"
"""Name of the stage, and of the probe in a bundle."""

MOST_LAYERS = 12
"""Layers that are tried at most."""

ANSWER_TOKENS = 48
"""Tokens of an answer that the keyword judge reads; a refusal shows by then."""


class Labels(NamedTuple):
    """Which answers refuse.

    Attributes:
        refused: of each answer; None where neither side can be told.
        how: by whom, in one sentence.
        counts: of verdicts.
        openings_agree: with the openings that were found, among the answers labelled.
    """

    refused: list[bool | None]
    how: str
    counts: dict[str, int]
    openings_agree: dict[str, float | int] | None


def response_stage(
    fit: Fit, openings: Openings, prompts: Prompts, edits: Sequence[Edit], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Answers to fit prompts of every kind, each unsteered and under one of `edits`, labelled, and the probe on them.

    Steered answers are among them since an edit moves the very residuals that are read: on the demo's sibling a probe
    of eight tokens that saw unsteered answers alone was right on 95 to 98 % of held steered ones, by layer, one that
    saw both on 99 to 100 %.

    Returns:
        The facts of `fit_response_probe`, and `skipped` with the reason where the model gave too few refusals or
        answers for one.
    """

    def make() -> dict[str, Any]:
        chosen = [index for kind in Kind for index in thinned(prompts.where(kind), max(1, fit.settings.most // 4))]
        asked = [prompts.items[index].ids for index in chosen]
        groups = [hashlib.sha256(json.dumps(ids).encode()).hexdigest() for ids in asked]
        arms: list[Edit | None] = [None] * len(asked)
        if edits:
            arms += [edits[place % len(edits)] for place in range(len(asked))]
            asked, groups = [*asked, *asked], [*groups, *groups]
        fit.say(f"  {len(asked)} answers, {len(edits)} edits")
        length = MOST_TOKENS + 1 if openings.is_tokens else ANSWER_TOKENS
        answers = greedy(fit.loaded, asked, arms, new_tokens=length)
        labels = label_answers(fit.loaded, openings, answers)
        rows = [row for row, refused in enumerate(labels.refused) if refused is not None]
        layers = candidate_layers(len(fit.loaded.blocks))
        facts = {
            "labels": labels.how,
            "verdicts": labels.counts,
            "openings_agree": labels.openings_agree,
            "answers": {"unsteered": len(chosen), "steered": len(asked) - len(chosen)},
            "edits": sorted({edit.name for edit in edits}),
        }
        try:
            with TemporaryDirectory(dir=fit.work, prefix="generated-") as folder:
                written = write_generated(
                    fit.loaded,
                    [asked[row] for row in rows],
                    [answers[row] for row in rows],
                    Path(folder),
                    layers=layers,
                    most=MOST_TOKENS,
                    edits=[arms[row] for row in rows],
                )
                probe = fit_response_probe(
                    written.layer,
                    layers,
                    written.mask,
                    [bool(labels.refused[row]) for row in rows],
                    [groups[row] for row in rows],
                )
        except TooFewPrompts as error:
            fit.say(f"  no response probe: {error}")
            return {"skipped": str(error), **facts}
        right = probe.facts["accuracy"]["rate"]
        fit.say(f"  layer {probe.layer}, {probe.tokens} tokens: right on {right:.1%} of held answers")
        return {**facts, **probe.facts, "tensors": _tensors(probe)}

    return fit.stage(RESPONSE, make, of=("most", "most_per_set", "most_plain"), after=after)


def response_probe_of(fit: Fit, facts: Mapping[str, Any]) -> Probe | None:
    """The probe that the stage left, as a bundle has it: one score and no categories; None where it was skipped."""
    if "skipped" in facts:
        return None
    tensors = fit.tensors(RESPONSE)
    return Probe(
        name=RESPONSE,
        layer=int(facts["layer"]),
        categories=(),
        weight=tensors["weight"].to(torch.float32),
        bias=tensors["bias"].to(torch.float32),
    )


def response_record(facts: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the probe's `ProbeRecord`."""
    told = ("labels", "verdicts", "answers", "edits", "penalty", "chosen", "imbalance", "shares", "n", "accuracy")
    return {
        "name": RESPONSE,
        "layer": facts["layer"],
        "position": "generated_tokens",
        "tokens": facts["tokens"],
        "categories": [],
        "operating_points": facts["operating_points"],
        "calibration": facts["calibration"]["balanced"],
        "provenance": {
            "method": "logistic regression on the mean residual of the first generated tokens, Platt scaling",
            **{name: facts[name] for name in told},
            **provenance,
        },
    }


def label_answers(loaded: LoadedModel, openings: Openings, answers: Sequence[Sequence[int]]) -> Labels:
    """Labels of generated answers."""
    if openings.is_tokens:
        refused = [
            True if openings.of(answer) else False if answer and answer[0] == openings.respond else None
            for answer in answers
        ]
        how = "the model's first token: a refusal token or [respond]; answers with neither are left out"
        return Labels(refused, how, _counts(refused), None)
    texts = [str(loaded.tokenizer.decode(list(answer), skip_special_tokens=True)) for answer in answers]
    verdicts = [one.verdict for one in KeywordJudge().judge([("", text) for text in texts])]
    refused = [{Verdict.REFUSAL: True, Verdict.ANSWER: False}.get(verdict) for verdict in verdicts]
    both = [
        label is (openings.of(answer) is not None)
        for label, answer in zip(refused, answers, strict=True)
        if label is not None
    ]
    how = (
        f"the keyword judge on greedy answers of up to {ANSWER_TOKENS} tokens; broken ones are left out. Agreement "
        "with the refusal openings is told beside it"
    )
    return Labels(refused, how, _counts(refused), Rate(count=sum(both), n=len(both)).to_json())


def candidate_layers(count: int) -> list[int]:
    """All blocks of a shallow model; of a deep one evenly spaced blocks from a quarter of its depth to the last."""
    if count <= MOST_LAYERS:
        return list(range(count))
    first = count // 4
    return sorted({first + round(step * (count - 1 - first) / (MOST_LAYERS - 1)) for step in range(MOST_LAYERS)})


def _counts(refused: Sequence[bool | None]) -> dict[str, int]:
    names = {True: "refused", False: "answered", None: "neither"}
    return {name: sum(one is value for one in refused) for value, name in names.items()}


def _tensors(probe: ResponseProbe) -> dict[str, torch.Tensor]:
    return {"weight": torch.from_numpy(probe.linear.weight), "bias": torch.from_numpy(probe.linear.bias)}
