"""Fakes: an engine that follows a script, and a catalog without tensors.

They implement the production seams; nothing here imports torch or vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.catalog import BundleView, Catalog, CategoryView, EditView, ProfileView
from server.engine import ChatCall, Chunk, Completion, ServedModel, WorkerReport
from steering import __version__
from steering.errors import EditNotApplied, TrimtabError
from steering.plan import Outcome, Plan, Scope

SAFETY, POLITICAL, RESPOND, WORD = 10, 11, 12, 1
MARKERS = {SAFETY: "[Safety]", POLITICAL: "[Political]", RESPOND: "[respond]"}
MODEL = "fake-model"
DIGEST = "sha256:" + "ab" * 32


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


def make_catalog(*bundles: BundleView) -> Catalog:
    """A catalog of these bundles, or of the one of `make_bundle`."""
    return Catalog(bundles=bundles or (make_bundle(),))


@dataclass
class FakeEngine:
    """Answers `words` after a first token that says how it was steered: refuse → Safety, comply → respond.

    Attributes:
        unsteered: first token of requests without a plan; the fake over-refuses, as the demo does.
        shows_markers: the first token's text is part of the content, as in models where it is ordinary text.
        confirms: outcomes are reported; without, steered requests must fail.
        tampered: fields in which reported outcomes differ from the plan.
        fails: raised after `fails_after` tokens.
        gate: when given, no token comes before it is set.
        calls, aborted, forgotten: what happened, for assertions.
    """

    words: Sequence[str] = ("Hello", " there", "!")
    unsteered: int = SAFETY
    shows_markers: bool = False
    confirms: bool = True
    tampered: dict[str, Any] = field(default_factory=dict)
    fails: Exception | None = None
    fails_after: int = 0
    gate: asyncio.Event | None = None
    gate_after: int = 0
    report_changes: dict[str, Any] = field(default_factory=dict)
    runs_ops: bool = True
    is_alive: bool = True
    calls: list[ChatCall] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    _outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    _witness: set[int] = field(default_factory=set)
    bundles: Sequence[BundleView] = field(default_factory=lambda: [make_bundle()])

    @property
    def model(self) -> ServedModel:
        return ServedModel(name=MODEL, created=1_700_000_000, context=512)

    async def complete(self, call: ChatCall) -> Completion:
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
                "message": {"role": "assistant", "content": "".join(text for _, text in said), "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for index, said in enumerate(pieces)
        ]
        return Completion(
            body={
                "id": f"chatcmpl-{call.request_id}",
                "object": "chat.completion",
                "created": 1_700_000_001,
                "model": MODEL,
                "choices": choices,
                "usage": _usage(sum(map(len, pieces))),
            },
            tokens=tuple([token for token, _ in said] for said in pieces),
        )

    async def stream(self, call: ChatCall) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        written = 0
        try:
            for index in range(call.samples):
                yield Chunk(body=_chunk(call, index, {"role": "assistant", "content": ""}))
            async for index, token, text in self._tokens(call):
                written += 1
                yield Chunk(body=_chunk(call, index, {"content": text}), tokens=[token])
            for index in range(call.samples):
                yield Chunk(body=_chunk(call, index, {"content": ""}, finish="stop"))
            yield Chunk(body={**_chunk(call, 0, {}), "choices": [], "usage": _usage(written)})
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(call.request_id)
            raise

    async def outcomes(self, plan_id: str, count: int, wait: float) -> Sequence[Outcome]:
        found = self._outcomes.get(plan_id, [])
        if len(found) < count:
            raise EditNotApplied(f"{len(found)} of {count} samples confirmed the edit within {wait:g} s")
        return found

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
        }
        return [WorkerReport(**{**fields, **self.report_changes})]

    async def clear_witness(self) -> None:
        self._witness.clear()

    def exposition(self) -> bytes:
        return b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"

    async def _tokens(self, call: ChatCall) -> AsyncGenerator[tuple[int, int, str], None]:
        """One token of every sample, then the next of every sample."""
        first = self.unsteered if call.plan is None else SAFETY if call.plan.edit.startswith("refuse") else RESPOND
        script = [(first, MARKERS[first] if self.shows_markers else ""), *((WORD, word) for word in self.words)]
        produced = 0
        for token, text in script[: call.fields.get("max_tokens")]:
            for index in range(call.samples):
                if self.gate is not None and produced >= self.gate_after:
                    await self.gate.wait()
                if self.fails is not None and produced >= self.fails_after:
                    raise self.fails
                await asyncio.sleep(0)
                if token == first and call.plan is not None:
                    self._apply(call.plan, call.request_id)
                produced += 1
                yield index, token, text

    def _apply(self, plan: Plan, request_id: str) -> None:
        if self.runs_ops:
            for bundle in self.bundles:
                if bundle.digest == plan.bundle:
                    self._witness |= set(bundle.edits[plan.edit].layers)
        if not self.confirms:
            return
        fields: dict[str, Any] = {
            "plan_id": plan.id,
            "request_id": request_id,
            "applied": True,
            "edit": plan.edit,
            "strength": plan.strength,
            "scope": plan.scope,
        }
        self._outcomes.setdefault(plan.id, []).append(Outcome(**{**fields, **self.tampered}))


def failing(error: TrimtabError, after: int = 0) -> FakeEngine:
    """An engine that fails after some tokens."""
    return FakeEngine(fails=error, fails_after=after)


def _usage(completion: int) -> dict[str, Any]:
    return {"prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 5 + completion}


def _chunk(call: ChatCall, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.request_id}",
        "object": "chat.completion.chunk",
        "created": 1_700_000_001,
        "model": MODEL,
        "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
