"""The oracle: transformers with the reference edit put in by forward hooks, one request at a time, no cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steering.plan import Scope
from steering.terms import Edit, LayerTerms, apply_terms


class Score(NamedTuple):
    """Per generated token: its log-probability, and that of the best token at its place."""

    given: list[float]
    best: list[float]


class Oracle:
    """Scores answers of a local model, computed in float32, under edits put in by hooks."""

    def __init__(self, model: Path, edits: Mapping[str, Edit]) -> None:
        import transformers

        # The eager attention: torch's fused one leaves out the soft cap of Gemma 2.
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._edits = edits

    @property
    def model(self) -> Any:
        """Transformers' own."""
        return self._model

    def score(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        edit: str | None = None,
        strength: float = 1.0,
        scope: str = "generated",
        begin: int | None = None,
    ) -> Score:
        """How likely each of `tokens` is after `prompt` and those before it, under the edit.

        `begin` is the first edited position, where it is not the one that `scope` says.

        One forward pass over the whole text: what an engine did in steps, with caches, in any batch, must agree.
        """
        first = 0 if scope == Scope.ALL else len(prompt) - 1
        with self._edited(edit, strength, first if begin is None else begin), torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        given = logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        return Score(given.tolist(), logprobs.max(-1).values.tolist())

    def greedy(
        self,
        prompt: Sequence[int],
        count: int,
        *,
        edit: str | None = None,
        strength: float = 1.0,
        scope: str = "generated",
    ) -> list[int]:
        """The `count` most likely tokens after `prompt`, one after the other, under the edit."""
        first = 0 if scope == Scope.ALL else len(prompt) - 1
        tokens = list(prompt)
        with self._edited(edit, strength, first), torch.inference_mode():
            for _ in range(count):
                logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    def residual(self, prompt: Sequence[int], layer: int) -> torch.Tensor:
        """[D] the unedited residual at the output of a decoder block, at the last token of `prompt`."""
        return self.residuals(prompt, prompt, layer)[0]

    def residuals(
        self,
        prompt: Sequence[int],
        text: Sequence[int],
        layer: int,
        *,
        edit: str | None = None,
        strength: float = 1.0,
        scope: str = "generated",
    ) -> torch.Tensor:
        """[n, D] residuals at the output of a decoder block, before its own edit, from the last token of `prompt` on.

        Args:
            prompt: the beginning of `text`.
            text: whose residuals are wanted; edits below the layer have their effect on them.
        """
        first = len(prompt) - 1
        kept: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output)[0, first:].clone())

        # Before the hooks that edit: hooks run in the order they were put in.
        hook = self._model.model.layers[layer].register_forward_hook(keep)
        try:
            with self._edited(edit, strength, 0 if scope == Scope.ALL else first), torch.inference_mode():
                self._model(torch.tensor([[*text]]), use_cache=False)
        finally:
            hook.remove()
        return kept[0].clone()

    @contextlib.contextmanager
    def _edited(self, edit: str | None, strength: float, first: int) -> Iterator[None]:
        hooks = [
            self._model.model.layers[terms.layer].register_forward_hook(partial(_edit, terms, strength, first))
            for terms in (self._edits[edit].layers if edit else ())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _edit(terms: LayerTerms, strength: float, first: int, _module: Any, _inputs: Any, output: Any) -> Any:
    stream = output[0] if isinstance(output, tuple) else output
    edited = stream.clone()
    edited[:, first:] = apply_terms(stream[:, first:], terms, strength)
    return (edited, *output[1:]) if isinstance(output, tuple) else edited
