"""Hooks resident: a process that holds a transformers model and generates with an edit put in by forward hooks.

What researchers steer with, on the same machine and shape as the engine. Run by `server.bench.beside`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.bench.companion import serve, take_over_output
from server.bench.peers import Peer
from server.bench.resident import FIRST_TOKEN
from steering.bundle import load_bundle
from steering.terms import LayerTerms, apply_terms


class HooksResident:
    """One transformers model.

    Args:
        settings: model: folder; is_drawn: weights are drawn and not read; bundle: folder; edit: its name; vocabulary:
            number of token ids to draw prompts from.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._vocabulary = int(settings["vocabulary"])
        (self._terms,) = load_bundle(Path(settings["bundle"])).edits[settings["edit"]].layers
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(settings["model"])
        torch.manual_seed(0)
        with self._device:
            if settings["is_drawn"]:
                model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=config.dtype)
        self._model: Any = model.to(self._device).eval()
        # Every answer has the length that was asked for, as the engine's have.
        self._model.generation_config.eos_token_id = None
        self._ran = 0

    def about(self) -> dict[str, Any]:
        """What runs here."""
        return {"device": str(self._device), "dtype": str(self._model.dtype), "layer": self._terms.layer}

    def order(self, peer: str, seed: int, *, requests: int, length: int, tokens: int) -> dict[str, Any]:
        """Answer random prompts of one length in one batch.

        Args:
            peer: a value of `Peer`: the way of the edit.
            seed: of the prompts.
            requests, length, tokens: of the batch, of each prompt, and of each answer.

        Returns:
            seconds, tokens, and edited: layers whose hook ran; or failed: what there was no memory for.
        """
        draw = random.Random(seed)
        rows = [[draw.randrange(FIRST_TOKEN, self._vocabulary) for _ in range(length)] for _ in range(requests)]
        prompts = torch.tensor(rows, device=self._device)
        self._ran = 0
        try:
            with self._way(Peer(peer)), torch.inference_mode():
                began = time.perf_counter()
                made = self._model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
                answers = made[:, length:].cpu()  # waits for the device
                seconds = time.perf_counter() - began
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return {"failed": str(error).partition("\n")[0]}
        return {
            "seconds": seconds,
            "tokens": answers.numel(),
            "edited": [self._terms.layer] if self._ran else [],
        }

    def _way(self, peer: Peer) -> AbstractContextManager[object]:
        ways: dict[Peer, Callable[[], AbstractContextManager[object]]] = {
            Peer.PLAIN: nullcontext,
            Peer.HOOKS: self._hooked,
            Peer.STEERING_VECTORS: self._by_steering_vectors,
            Peer.REPENG: self._by_repeng,
        }
        return ways[peer]()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        blocks = self._model.get_decoder().layers
        terms = LayerTerms(
            layer=self._terms.layer,
            **{name: getattr(self._terms, name).to(self._device) for name in ("read", "write", "gain", "bias")},
        )
        hook = blocks[terms.layer].register_forward_hook(partial(self._edit, terms))
        try:
            yield
        finally:
            hook.remove()

    def _edit(self, terms: LayerTerms, _module: Any, _inputs: Any, output: Any) -> Any:
        """The last position of a pass: of the prompt's, its last token; of every later one, the only token."""
        self._ran += 1
        stream = output[0] if isinstance(output, tuple) else output
        edited = stream.clone() if stream.shape[1] > 1 else stream
        edited[:, -1] = apply_terms(stream[:, -1], terms, 1.0)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    @property
    def _vector(self) -> Tensor:
        """[D] what an addition adds."""
        return (self._terms.bias @ self._terms.write).to(self._device, self._model.dtype)

    @contextmanager
    def _by_steering_vectors(self) -> Iterator[None]:
        """By steering-vectors 0.12: a hook that adds the vector at every position."""
        from steering_vectors import SteeringVector  # type: ignore[import-not-found]

        with SteeringVector({self._terms.layer: self._vector}, "decoder_block").apply(self._model), self._witnessed():
            yield

    @contextmanager
    def _by_repeng(self) -> Iterator[None]:
        """By repeng 0.4: blocks wrapped in modules that add the vector at every position."""
        if not hasattr(np, "float_"):
            vars(np)["float_"] = np.float64  # NumPy 2 dropped the name, without which repeng cannot be imported
        from repeng import ControlModel  # type: ignore[import-not-found]

        controlled = ControlModel(self._model, [self._terms.layer])
        try:
            # Some versions wrap every block, whatever they are asked for.
            nothing = torch.zeros_like(self._vector)
            controlled.set_raw_control(
                {layer: self._vector if layer == self._terms.layer else nothing for layer in controlled.layer_ids}
            )
            with self._witnessed():
                yield
        finally:
            controlled.unwrap()

    @contextmanager
    def _witnessed(self) -> Iterator[None]:
        """Counts the passes of the edited block, which the packages do not tell."""

        def count(_module: Any, _inputs: Any, _output: Any) -> None:
            self._ran += 1

        hook = self._model.get_decoder().layers[self._terms.layer].register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def main() -> None:
    """Hold the model for as long as there are orders."""
    answers = take_over_output()
    resident = HooksResident(json.loads(sys.argv[1]))
    serve(answers, resident.about(), resident.order)


if __name__ == "__main__":
    main()
