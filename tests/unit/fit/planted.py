"""A fake engine in which one direction a layer decides whether a prompt is refused: what a topic fit should find.

It answers asks as `steering.engine.offline.OfflineEngine` does, applies the terms of real bundles to its residuals, and
writes what it captures in the engine's format. Tokens are bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.bundle import Bundle, load_bundle
from steering.engine.asks import Answer, Ask, BundleGate, EditOrder, Sample
from steering.engine.options import CaptureSettings
from steering.fit.captured import CapturedShards
from steering.fit.topic_fit import EngineOpener
from steering.gate import rule
from steering.outcome import Outcome
from steering.plan import Decision, Scope
from steering.terms import delta

DEPTH, WIDTH = 6, 24
TOPIC, HARM, PLAIN = "strike", "poison", "knot"
HEADER = (2,)
REFUSAL, RESPOND = 256, 257
"""First tokens of a model with decision tokens; the rest are bytes."""
NO, YES = "I cannot help with that, sorry.", "Sure: first take the rope, then make a loop and pull it tight."
BABBLE = "la la la la la la"


def model_folder(folder: Path) -> Path:
    """A folder that can be fingerprinted as a model of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "vocab_size": 258,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def prompts(word: str, count: int) -> list[str]:
    """Numbered prompts of one kind."""
    return [f"Tell me of the {word} number {number}" for number in range(count)]


@cache
def _normal(name: str) -> float:
    """A number that is always the same for a name."""
    return random.Random(name).gauss(0.0, 1.0)


@cache
def _noise(name: str) -> Tensor:
    """[D], always the same for a name."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randn(WIDTH, generator=generator)


@cache
def _unit(seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


@dataclass(frozen=True)
class Planted:
    """What the fake model is like.

    Attributes:
        refuses: by kind of prompt, its mean refusal; 0 is the threshold, the noise has a standard deviation of 0.3.
        breaks_at: length of an edit, in units of the layer's size, at which answers become babble.
        decides_by_token: answers begin with a decision token.
        not_finite: prompts whose residuals are NaN at layer 2.
    """

    refuses: Mapping[str, float] = field(default_factory=lambda: {TOPIC: 1.2, HARM: 1.2, PLAIN: -1.0})
    breaks_at: float = 8.0
    decides_by_token: bool = True
    not_finite: str = ""

    def size(self, layer: int) -> float:
        """Length of the refusal direction's unit at a layer; grows with depth as in real models."""
        return 1.0 + 2.0 * layer

    def direction(self, layer: int) -> Tensor:
        """[D], towards refusal."""
        return _unit(100 + layer)

    def kind(self, text: str) -> str:
        """Which word the text holds; plain where none."""
        return next((word for word in self.refuses if word in text), PLAIN)

    def refusal(self, text: str) -> float:
        """How far beyond the threshold a prompt lies."""
        return self.refuses[self.kind(text)] + 0.3 * _normal(text)

    def residual(self, text: str, layer: int) -> Tensor:
        """[D]: where the refusal is, what the prompt is about, and noise around a common mean."""
        noise = 0.2 * _noise(f"{text}/{layer}")
        about = torch.zeros(WIDTH) if self.kind(text) == PLAIN else _unit(sum(self.kind(text).encode()))
        # The first layer knows next to nothing yet.
        known = 0.1 if layer == 0 else 1.0
        found = known * (self.refusal(text) * self.direction(layer) + about) + noise + 2.0 * _unit(layer)
        if self.not_finite and self.not_finite in text and layer == 2:
            found = found * math.nan
        return found * self.size(layer)


@dataclass
class PlantedTokenizer:
    """Bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """One token a byte."""
        del add_special_tokens
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return bytes(one for one in ids if 2 < one < 256).decode()


class PlantedEngine:
    """See the module; made by `opener`."""

    def __init__(self, planted: Planted, bundles: Sequence[Path], capture: CaptureSettings | None) -> None:
        self.tokenizer = PlantedTokenizer()
        self._planted = planted
        self._bundles = {bundle.digest: bundle for bundle in map(load_bundle, bundles)}
        self._capture = capture
        self._kept: list[str] = []

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The text and a header."""
        return (*messages[-1]["content"].encode(), *HEADER)

    def ask(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = lambda _done: None) -> list[Answer]:
        """One after the other."""
        found = []
        for number, ask in enumerate(asks, 1):
            if ask.capture:
                self._kept.append(self._text(ask))
            found.append(self._answer(ask))
            on_progress(number)
        if any(ask.capture for ask in asks):
            self._flush()
        return found

    def capture(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = lambda _done: None) -> CapturedShards:
        """Residuals alone."""
        self._kept += [self._text(ask) for ask in asks]
        on_progress(len(asks))
        self._flush()
        return self.captured()

    def captured(self) -> CapturedShards:
        """From the folder."""
        assert self._capture is not None
        return CapturedShards(self._capture.folder, count=len(self._kept))

    def _text(self, ask: Ask) -> str:
        return bytes(ask.prompt[: -len(HEADER)]).decode()

    def _flush(self) -> None:
        assert self._capture is not None
        self._capture.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"index": torch.arange(len(self._kept))}
        for layer in range(DEPTH):
            tensors[f"layer.{layer}"] = torch.stack([self._planted.residual(text, layer) for text in self._kept])
        facts = {"layers": json.dumps(list(range(DEPTH))), "width": str(WIDTH), "generated": "0"}
        save_file(tensors, self._capture.folder / "capture-00000.safetensors", metadata=facts)

    def _answer(self, ask: Ask) -> Answer:
        text = self._text(ask)
        outcomes: tuple[Outcome, ...] = ()
        if ask.gate is not None:
            ask, outcomes = self._ruled(ask, ask.gate, text)
        pushed, length = self._pushed(ask, text)
        if ask.answer is not None:
            return Answer(given=tuple(-1.0 - 0.2 * length for _ in ask.answer))
        samples, read = [], []
        for number in range(ask.samples):
            draw = 0.0
            if ask.temperature > 0:
                draw = 0.2 * _normal(f"{ask.seed}/{number}")
            refused = self._planted.refusal(text) + pushed + draw > 0
            said = BABBLE if length > self._planted.breaks_at else NO if refused else YES
            first = (REFUSAL if refused else RESPOND,) if self._planted.decides_by_token else ()
            tokens = (*first, *said.encode())[: ask.max_tokens]
            read.append(0.9 if refused else 0.1)
            samples.append(
                Sample(
                    tokens=tokens,
                    logprobs=tuple(-0.5 for _ in tokens),
                    text=bytes(one for one in tokens if one < 256).decode(),
                    finish="stop" if len(tokens) < ask.max_tokens else "length",
                )
            )
        is_read = any(bundle.manifest.response is not None for bundle in self._bundles.values())
        return Answer(samples=tuple(samples), outcomes=outcomes, response=tuple(read) if is_read else None)

    def _ruled(self, ask: Ask, gate: BundleGate, text: str) -> tuple[Ask, tuple[Outcome, ...]]:
        """The ask with the edit that the gate chooses, and what is reported of it."""
        bundle = self._bundles[gate.bundle]
        profile = bundle.manifest.profile(gate.order.profile)
        assert profile.gate is not None
        probe = bundle.probes[profile.gate.probe]
        ruling = rule(probe.logits(self._planted.residual(text, probe.layer)), gate.order, probe.categories)
        assert ruling is not None
        edits = {Decision.COMPLY: profile.comply, Decision.REFUSE: profile.refuse}.get(ruling.decision, {})
        edit = edits.get(probe.categories[ruling.category])
        order = EditOrder(bundle=gate.bundle, edit=edit, scope=Scope.GENERATED) if edit else None
        told = Outcome(
            plan_id="",
            request_id="",
            applied=edit is not None,
            edit=edit,
            strength=1.0 if edit else 0.0,
            scope=Scope.GENERATED,
            decision=ruling.decision,
        )
        return replace(ask, gate=None, edit=order), (told,)

    def _pushed(self, ask: Ask, text: str) -> tuple[float, float]:
        """By how much an edit moves the refusal, and its length, both in units of each layer's size."""
        if ask.edit is None:
            return 0.0, 0.0
        bundle: Bundle = self._bundles[ask.edit.bundle]
        pushed, squares = 0.0, 0.0
        for terms in bundle.edits[ask.edit.edit].layers:
            added = delta(self._planted.residual(text, terms.layer).unsqueeze(0), terms, ask.edit.strength)[0]
            added = added / self._planted.size(terms.layer)
            # Positions before the last one add a little.
            weight = 1.2 if ask.edit.scope is Scope.ALL else 1.0
            pushed += weight * float(added @ self._planted.direction(terms.layer)) / 2
            squares += float(added.square().sum())
        return pushed, math.sqrt(squares)


def opener(planted: Planted, started: list[str] | None = None) -> EngineOpener:
    """An `EngineOpener`; `started` hears of each engine that is started."""

    @contextmanager
    def start(*, bundles: Sequence[Path] = (), capture: CaptureSettings | None = None) -> Iterator[PlantedEngine]:
        if started is not None:
            started.append("capture" if capture is not None else "steer")
        yield PlantedEngine(planted, bundles, capture)

    return start
