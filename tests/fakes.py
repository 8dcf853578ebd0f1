"""Fakes: an engine that follows a script, and a catalog without tensors.

They implement the production seams; nothing here imports torch or vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.catalog import (
    BundleView,
    Catalog,
    CategoryView,
    EditView,
    GateView,
    PointView,
    ProbeView,
    ProfileView,
    ResponseView,
)
from server.engine import Call, Chunk, Completion, Prompting, ServedModel, WorkerReport
from steering import __version__
from steering.errors import BundleFormatError, EditNotConfirmed, TrimtabError, UnknownName
from steering.outcome import Outcome, Response, Scores
from steering.plan import Decision, GateOrder, Plan, Scope, log_odds
from tests.fake_prompts import MARKERS, POLITICAL, RESPOND, SAFETY, WORD, rendered

MODEL = "fake-model"
DIGEST = "sha256:" + "ab" * 32
GATED_DIGEST = "sha256:" + "ef" * 32


def make_edit(name: str, purpose: str, category: str, layers: tuple[int, ...] = (3,)) -> EditView:
    """An edit certified for strengths 0 to 2."""
    return EditView(
        name=name,
        purpose=purpose,
        category=category,
        layers=layers,
        dose="coefficient 4.0 along a unit direction",
        minimum=0.0,
        maximum=2.0,
        measured="not measured: a fake",
    )


def make_bundle(name: str = "fake-bundle", digest: str = DIGEST, **changes: Any) -> BundleView:
    """A bundle of two categories; only Safety can be lowered, both can be raised."""
    edits = [
        make_edit("refuse-safety", "refuse", "Safety"),
        make_edit("comply-safety", "comply", "Safety"),
        make_edit("refuse-political", "refuse", "Political", layers=(2, 4)),
    ]
    profile = ProfileView(
        name="refusal-control",
        description="Raise or lower refusals of a category.",
        refuse={"Safety": "refuse-safety", "Political": "refuse-political"},
        comply={"Safety": "comply-safety"},
        default_category="Safety",
        strength=1.0,
        scope=Scope.GENERATED,
    )
    fields: dict[str, Any] = {
        "name": name,
        "version": "1",
        "label": f"{name}@{digest[:19]}",
        "digest": digest,
        "categories": {
            "Safety": CategoryView(name="Safety", token=MARKERS[SAFETY], token_id=SAFETY),
            "Political": CategoryView(name="Political", token=MARKERS[POLITICAL], token_id=POLITICAL),
        },
        "edits": {edit.name: edit for edit in edits},
        "profiles": {profile.name: profile},
        "default_profile": profile.name,
        "respond": MARKERS[RESPOND],
        "respond_id": RESPOND,
    }
    return BundleView(**{**fields, **changes})


def make_gated_bundle(**changes: Any) -> BundleView:
    """The bundle of `make_bundle` with a gate in its default profile, and `manual`, which has none.

    The gate complies up to 0.2 and refuses from 0.6 on; `changes` are of its `GateView`.
    """
    bundle = make_bundle(name="gated-bundle", digest=GATED_DIGEST)
    manual = bundle.profiles["refusal-control"]
    point = PointView(
        name="youden", threshold=0.6, true_positive_rate=0.9, false_positive_rate=0.1, positives=50, negatives=60
    )
    probe = ProbeView(name="prompt", layer=2, categories=("Safety", "Political"), operating_points=(point,))
    gate = GateView(**{"probe": probe, "comply_below": 0.2, "refuse_above": 0.6, **changes})
    profiles = {
        "refusal-control": dataclasses.replace(manual, gate=gate),
        "manual": dataclasses.replace(manual, name="manual"),
    }
    return dataclasses.replace(bundle, profiles=profiles, probes={probe.name: probe})


def make_reading_bundle(**changes: Any) -> BundleView:
    """The bundle of `make_bundle` for a model without refusal tokens, with a response probe of threshold 0.7."""
    bundle = make_bundle()
    categories = {name: CategoryView(name=name) for name in bundle.categories}
    response = ResponseView(name="response", layer=3, tokens=4, threshold=0.7)
    return dataclasses.replace(
        bundle, categories=categories, respond=None, respond_id=None, **{"response": response, **changes}
    )


def read(refusal: float, safety: float = 0.7) -> Scores:
    """What a probe of the two categories read, as probabilities."""
    # Certainty is a large score; what is no probability stays what it is.
    score = max(-700.0, min(700.0, log_odds(refusal))) if 0 <= refusal <= 1 else refusal
    shares = [max(math.log(share), -700.0) if 0 < share <= 1 else share or -700.0 for share in (safety, 1 - safety)]
    return Scores(names=("Safety", "Political"), logits=(score, *shares))


def make_catalog(*bundles: BundleView) -> Catalog:
    """A catalog of these bundles, or of the one of `make_bundle`."""
    return Catalog(bundles=bundles or (make_bundle(),))


@dataclass
class FakeEngine:
    """Answers `words` after a first token that says how it was steered: refuse → Safety, comply → respond.

    Attributes:
        unsteered: first token of what is not edited; the fake over-refuses, as the demo does.
        scores: what its probes read, by sample; the last also for samples after it.
        answers: log-odds that its response probe reads of each sample, NaN for nothing.
        likeliest: the token it prefers where only some are allowed.
        shows_markers: the first token's text is part of the content, as in models where it is ordinary text.
        confirms: outcomes are reported; without, steered requests must fail.
        silent: samples whose outcome is not reported.
        tampered: fields in which reported outcomes differ from the plan.
        cuts: what its chat template takes out of messages, as a pattern.
        ends: text that its chat template puts at the end of a prompt.
        tells_prompts: answers tell the tokens of their prompt.
        is_chat: its model has a chat template.
        fails: raised after `fails_after` tokens.
        gate: when given, no token comes before it is set.
        loadable: bundles that can be loaded, by folder.
        generated: tokens made so far.
        calls, aborted, forgotten, read, tokenized: what happened, for assertions.
    """

    words: Sequence[str] = ("Hello", " there", "!")
    unsteered: int = SAFETY
    scores: Sequence[Scores] = (read(0.95),)
    answers: Sequence[float] = ()
    likeliest: int = POLITICAL
    shows_markers: bool = False
    confirms: bool = True
    silent: Collection[int] = ()
    tampered: dict[str, Any] = field(default_factory=dict)
    cuts: str = "(?!)"
    ends: str = ""
    tells_prompts: bool = True
    is_chat: bool = True
    fails: Exception | None = None
    fails_after: int = 0
    gate: asyncio.Event | None = None
    gate_after: int = 0
    report_changes: dict[str, Any] = field(default_factory=dict)
    runs_ops: bool = True
    is_alive: bool = True
    generated: float = 0
    calls: list[Call] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    tokenized: int = 0
    _outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    _witness: set[int] = field(default_factory=set)
    bundles: Sequence[BundleView] = field(default_factory=lambda: [make_bundle(), make_gated_bundle()])
    loadable: Mapping[Path, BundleView] = field(default_factory=dict)

    @property
    def model(self) -> ServedModel:
        return ServedModel(name=MODEL, created=1_700_000_000, context=512, is_chat=self.is_chat)

    async def complete(self, call: Call) -> Completion:
        self.calls.append(call)
        pieces: list[list[tuple[int, str]]] = [[] for _ in range(call.samples)]
        try:
            async for index, token, text in self._tokens(call):
                pieces[index].append((token, text))
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(call.request_id)
            raise
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(text for _, text in said),
                    "refusal": None,
                    **_echo(call),
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
            for index, said in enumerate(pieces)
        ]
        return Completion(
            body={
                "id": _name(call),
                "object": "chat.completion",
                "created": 1_700_000_001,
                "model": MODEL,
                "choices": choices,
                "usage": _usage(sum(map(len, pieces))),
            },
            tokens=tuple([token for token, _ in said] for said in pieces),
            prompt=self._prompt(call.fields, call.prompting) if self.tells_prompts else (),
        )

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        written = 0
        try:
            for index in range(call.samples if call.prompting is Prompting.CHAT or _echo(call) else 0):
                yield Chunk(body=_chunk(call, index, {"role": "assistant", **(_echo(call) or {"content": ""})}))
            async for index, token, text in self._tokens(call):
                prompt = self._prompt(call.fields, call.prompting) if self.tells_prompts and not written else ()
                written += 1
                yield Chunk(body=_chunk(call, index, {"content": text}), tokens=[token], prompt=prompt)
            for index in range(call.samples):
                yield Chunk(body=_chunk(call, index, {"content": ""}, finish="stop"))
            yield Chunk(body={**_chunk(call, 0, {}), "choices": [], "usage": _usage(written)})
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(call.request_id)
            raise

    async def outcomes(self, plan_id: str, samples: Collection[int], wait: float) -> Mapping[int, Outcome]:
        found = self._outcomes.get(plan_id, {})
        if not set(samples) <= set(found):
            raise EditNotConfirmed(f"{sorted(found)} of {sorted(samples)} samples confirmed the edit within {wait:g} s")
        return found

    def responses(self, plan_id: str) -> Mapping[int, Response]:
        self.read.append(plan_id)
        return {
            sample: Response(plan_id=plan_id, request_id=f"{sample}_sample", tokens=len(self.words), score=score)
            for sample, score in enumerate(self.answers)
            if not math.isnan(score)
        }

    async def tokenize(self, fields: Mapping[str, Any], prompting: Prompting) -> Sequence[int]:
        self.tokenized += 1
        return self._prompt(fields, prompting)

    def _prompt(self, fields: Mapping[str, Any], prompting: Prompting) -> Sequence[int]:
        return rendered(fields, prompting, cuts=self.cuts, ends=self.ends)

    def forget(self, plan_id: str) -> None:
        self.forgotten.append(plan_id)

    async def reports(self) -> Sequence[WorkerReport]:
        fields: dict[str, Any] = {
            "version": __version__,
            "architecture": "LlamaForCausalLM",
            "runner": "v1",
            "hidden_size": 64,
            "layers": (2, 3, 4),
            "bundles": {bundle.digest: tuple(bundle.edits) for bundle in self.bundles},
            "rows": 256,
            "witness": tuple(sorted(self._witness)),
            "gates": {
                bundle.digest: tuple(name for name, profile in bundle.profiles.items() if profile.gate is not None)
                for bundle in self.bundles
            },
            "responses": {
                bundle.digest: bundle.response.tokens for bundle in self.bundles if bundle.response is not None
            },
        }
        return [WorkerReport(**{**fields, **self.report_changes})]

    async def clear_witness(self) -> None:
        self._witness.clear()

    async def load(self, path: Path) -> str:
        if path not in self.loadable:
            raise BundleFormatError(f"no bundle in {path}; there are {sorted(map(str, self.loadable))}")
        bundle = self.loadable[path]
        if all(loaded.digest != bundle.digest for loaded in self.bundles):
            self.bundles = [*self.bundles, bundle]
        return bundle.digest

    async def unload(self, digest: str) -> None:
        left = [bundle for bundle in self.bundles if bundle.digest != digest]
        if len(left) == len(self.bundles):
            raise UnknownName(f"no bundle {digest} is loaded", parameter="bundle")
        self.bundles = left

    def exposition(self, *, is_open: bool = False) -> bytes:
        return b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"

    async def _tokens(self, call: Call) -> AsyncGenerator[tuple[int, int, str], None]:
        """One token of every sample, then the next of every sample."""
        limit = call.fields.get("max_tokens", len(self.words) + 1)
        produced = 0
        for step in range(min(limit, len(self.words) + 1)):
            for index in range(call.samples):
                if self.gate is not None and produced >= self.gate_after:
                    await self.gate.wait()
                if self.fails is not None and produced >= self.fails_after:
                    raise self.fails
                await asyncio.sleep(0)
                produced += 1
                self.generated += 1
                if step:
                    yield index, WORD, self.words[step - 1]
                else:
                    token = self._first(call, index)
                    yield index, token, MARKERS[token] if self.shows_markers else ""

    def _first(self, call: Call, index: int) -> int:
        if call.plan is None or not call.plan.is_steering:
            allowed = call.fields.get("allowed_token_ids", [self.unsteered])
            return self.likeliest if self.likeliest in allowed else int(allowed[0])
        outcome = self._apply(call.plan, index)
        if outcome.edit is None:
            return self.unsteered
        return SAFETY if outcome.edit.startswith("refuse") else RESPOND

    def _apply(self, plan: Plan, index: int) -> Outcome:
        bundle = next(bundle for bundle in self.bundles if bundle.digest == plan.bundle)
        fields: dict[str, Any] = {
            "plan_id": plan.id,
            "request_id": f"{index}_sample",
            "applied": True,
            "edit": plan.edit,
            "strength": plan.strength,
            "scope": plan.scope,
            "reasoning": plan.reasoning,
        }
        if plan.gate is not None:
            fields |= self._ruled(plan.gate, plan.strength, bundle, self.scores[min(index, len(self.scores) - 1)])
        outcome = Outcome(**{**fields, **self.tampered})
        if self.runs_ops and fields["edit"]:
            self._witness |= set(bundle.edits[fields["edit"]].layers)
        if self.confirms and index not in self.silent:
            self._outcomes.setdefault(plan.id, {})[index] = outcome
        return outcome

    def _ruled(self, order: GateOrder, strength: float, bundle: BundleView, scores: Scores) -> dict[str, Any]:
        """What a gate reports; the rule is written out here once more, as the gateway's own checks must agree."""
        profile = bundle.profiles[order.profile]
        of_category = dict(zip(scores.names, scores.logits[1:], strict=True))
        category = max(order.categories or scores.names, key=lambda name: of_category[name])
        decision, edits, share = Decision.ABSTAIN, {}, 1.0
        if order.refuse_above < 1 and scores.logits[0] >= log_odds(order.refuse_above):
            decision, edits = Decision.REFUSE, dict(profile.refuse)
            share = max(0.0, scores.refusal - order.refuse_above) / (1 - order.refuse_above)
        elif order.comply_below > 0 and scores.logits[0] <= log_odds(order.comply_below):
            decision, edits = Decision.COMPLY, dict(profile.comply)
            share = max(0.0, order.comply_below - scores.refusal) / order.comply_below
        edit = edits.get(category)
        is_applied = edit is not None and not order.is_observed
        return {
            "applied": is_applied,
            "edit": edit if is_applied else None,
            "strength": strength * (share if order.is_graded else 1.0) if is_applied else 0.0,
            "decision": decision if edit else Decision.ABSTAIN,
            "category": category,
            "scores": scores,
        }


def failing(error: TrimtabError, after: int = 0) -> FakeEngine:
    """An engine that fails after some tokens."""
    return FakeEngine(fails=error, fails_after=after)


def _name(call: Call) -> str:
    return f"{'chatcmpl' if call.prompting is Prompting.CHAT else 'cmpl'}-{call.request_id}"


def _echo(call: Call) -> dict[str, Any]:
    """The prompt, where it is to be echoed; ids as their numbers."""
    prompt = call.fields.get("prompt")
    return {"prompt": prompt if isinstance(prompt, str) else str(prompt)} if call.fields.get("echo") else {}


def _usage(completion: int) -> dict[str, Any]:
    return {"prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 5 + completion}


def _chunk(call: Call, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": _name(call),
        "object": "chat.completion.chunk",
        "created": 1_700_000_001,
        "model": MODEL,
        "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
