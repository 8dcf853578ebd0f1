"""Servers for tests: `trimtab serve` as a process of its own, and a tiny model whose edits force its first token."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_PATIENCE = 400.0
"""Seconds; an engine on a busy machine of two cores."""

CATEGORIES = ("Safety", "Political")
GATED, SHADOWED = "gated", "shadowed"
GATE_LAYER = 1
THRESHOLDS = (0.4, 0.6)
READ = {
    "how do I rob a bank": (4.0, 2.0, -2.0),
    "how do I overthrow a government": (3.0, -2.0, 2.0),
    "how do I kill a process": (-4.0, 1.0, -1.0),
    "how do I boil an egg": (0.1, 1.0, -1.0),
}
"""What the probe of the tiny bundle reads from prompts: log-odds of refusal, and a score per category."""
RESPOND = "[respond]"
MODEL = "tiny"
CONTEXT = 512


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of its root, for clients.
        admin: of its root, for operators.
        process: its main process.
        log: lines of its output so far.
    """

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    admin: str = ""

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Server]:
    """`trimtab serve --port 0` with these arguments, from the moment it is ready until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--admin-port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    lines: queue.Queue[str | None] = queue.Queue()
    server = Server(url="", process=process)

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                server.log.append(line.rstrip())
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while not server.admin:
            line = lines.get(timeout=START_PATIENCE)
            if line is None:
                raise AssertionError("the server ended before it was ready:\n" + "\n".join(server.log[-40:]))
            if found := re.match(r"Ready on (\S+)", line):
                server.url = found.group(1)
            elif found := re.match(r"Metrics and administration on (\S+)", line):
                server.admin = found.group(1)
        yield server
    finally:
        server.stop()
        reader.join(timeout=30)


def make_tiny_served_model(folder: Path) -> tuple[Path, Path]:
    """A random Llama with a chat template, and a bundle whose edits force the first token and whose probe reads `READ`.

    The profile `forced` has no gate, `gated` is the same with one, and so is `shadowed`. The edit of a side and
    category adds, at the last layer, a long vector along the unembedding row of the token that the side should begin
    with; all norm weights are 1 and rows are nearly orthogonal, so that token wins every step.

    Returns:
        The model's folder and the bundle's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from steering.bundle import save_bundle
    from steering.fingerprint import fingerprint_of
    from steering.gate import Probe
    from steering.terms import Edit, added_direction

    model, bundle = folder / "model", folder / "bundle"
    ids = _write_tokenizer(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<|pad|>"],
    )
    network = LlamaForCausalLM(config).to(torch.float32)
    network.save_pretrained(model)
    rows = network.lm_head.weight.detach()

    def towards(token: str) -> tuple[Any, ...]:
        row = rows[ids[token]]
        return (added_direction(layer=config.num_hidden_layers - 1, direction=row / row.norm(), coefficient=500.0),)

    edits: dict[str, Edit] = {}
    records: list[dict[str, Any]] = []
    for category in CATEGORIES:
        for purpose, token in (("refuse", f"[{category}]"), ("comply", RESPOND)):
            name = f"{purpose}-{category.lower()}"
            edits[name] = Edit(name=name, layers=towards(token))
            records.append(
                {
                    "name": name,
                    "purpose": purpose,
                    "category": category,
                    "dose": f"coefficient 500 along the unembedding row of {token}",
                    "strength": {"minimum": 0.5, "maximum": 2.0, "measured": "by construction"},
                }
            )
    forced = {
        "name": "forced",
        "description": "Forces the first token.",
        "refuse": {category: f"refuse-{category.lower()}" for category in CATEGORIES},
        "comply": {category: f"comply-{category.lower()}" for category in CATEGORIES},
        "default_category": CATEGORIES[0],
    }
    gate = {"probe": "prompt", "comply_below": THRESHOLDS[0], "refuse_above": THRESHOLDS[1]}
    prompts = residuals(network, model, [*READ])
    targets = torch.tensor([*READ.values()])
    probe = Probe(
        name="prompt",
        layer=GATE_LAYER,
        categories=CATEGORIES,
        weight=torch.linalg.lstsq(prompts.double(), targets.double(), driver="gelsd").solution.T.float().contiguous(),
        bias=torch.zeros(1 + len(CATEGORIES)),
    )
    save_bundle(
        bundle,
        {
            "name": "tiny-bundle",
            "version": "1",
            "model": fingerprint_of(model).model_dump(),
            "categories": [
                {"name": category, "token": f"[{category}]", "token_id": ids[f"[{category}]"]}
                for category in CATEGORIES
            ],
            "respond": {"token": RESPOND, "token_id": ids[RESPOND]},
            "edits": records,
            "probes": [{"name": "prompt"}],
            "profiles": [forced, *({**forced, "name": name, "gate": gate} for name in (GATED, SHADOWED))],
            "default_profile": "forced",
        },
        edits,
        {probe.name: probe},
    )
    return model, bundle


def residuals(network: Any, model: Path, prompts: list[str]) -> Any:
    """[prompts, D] what the probe reads: the residual at the output of its layer, at the last token of the prompt."""
    import torch

    with torch.no_grad():
        seen = [network(prompt_ids(model, prompt), output_hidden_states=True).hidden_states for prompt in prompts]
    return torch.stack([states[GATE_LAYER + 1][0, -1] for states in seen])


def prompt_ids(model: Path, prompt: str) -> Any:
    """[1, T] token ids of a conversation of one user message, as the server renders it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level tokenizer of 512 tokens with a chat template; returns the ids of its special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    special += [*(f"[{category}]" for category in CATEGORIES), RESPOND]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and asks how to kill a process"] * 4,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{{ m['content'] if m['content'] is string else (m['content'] or [])|map(attribute='text')|join('') }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return {token: bpe.token_to_id(token) for token in special}
