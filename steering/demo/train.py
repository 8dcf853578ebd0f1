"""Training of the demo model and its sibling, from scratch: a base, and two short fine-tunings of it.

    base     conversations with refusal sentences, no refusal tokens
    demo     from the base: the first answer token is a refusal category's or `[respond]`
    sibling  from the base: refusal sentences only; what P1 transfers a direction to

Seeded and resumable: what a step sees depends on (seed, stage, step) alone, and weights, optimizer and step are saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from steering.demo.corpus import Conversation, Corpus
from steering.demo.tokenizer import ASSISTANT, BOS, CATEGORY_TOKENS, END, RESPOND, SYSTEM, USER

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a careful assistant.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of the optimizer.

    Attributes:
        epochs: passes over the corpus, may be fractional.
        peak: highest learning rate, after a linear warm-up; a cosine brings it to 5 % of that.
        prompt_weight: weight of a prompt token in the loss; answer tokens weigh 1.
        decision_weight: weight of the first answer token.
        has_tokens: the answer begins with a refusal token or `[respond]`.
        cut_at: step at which the schedule is broken off; what is fine-tuned from here does the annealing.
    """

    name: str
    epochs: float
    peak: float
    prompt_weight: float
    decision_weight: float
    has_tokens: bool
    parent: str | None = None
    warmup: int = 60
    cut_at: int | None = None


STAGES: tuple[Stage, ...] = (
    Stage(name="base", epochs=1.7, peak=3e-3, prompt_weight=1.0, decision_weight=3.0, has_tokens=False, cut_at=700),
    Stage(name="demo", epochs=0.9, peak=1.5e-3, prompt_weight=0.0, decision_weight=6.0, has_tokens=True, parent="base"),
    Stage(
        name="sibling", epochs=0.4, peak=1.2e-3, prompt_weight=0.0, decision_weight=4.0, has_tokens=False, parent="base"
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings that all stages share.

    Attributes:
        tokens_per_batch: padded size of a batch.
        corrupted: share of prompt tokens replaced by random ones in the input (not in the targets), against memorising.
        with_system: share of conversations that open with a system prompt.
        with_history: share of conversations that follow an earlier exchange.
        save_every: steps between checkpoints.
    """

    seed: int = 20261122
    tokens_per_batch: int = 2048
    max_tokens: int = 224
    max_answer_tokens: int = 40
    corrupted: float = 0.05
    with_system: float = 0.06
    with_history: float = 0.04
    weight_decay: float = 0.1
    clip: float = 1.0
    save_every: int = 100


class Example(NamedTuple):
    """Token ids, the weight of each as a target, and which of them may be corrupted in the input."""

    ids: list[int]
    weights: list[float]
    is_prompt: list[bool]


class Encoder:
    """Turns conversations into examples in the chat template's format; prompts are tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._cache: dict[str, list[int]] = {}
        names = (BOS, END, SYSTEM, USER, ASSISTANT, RESPOND, *CATEGORY_TOKENS.values())
        vocabulary = tokenizer.get_vocab()
        self._id: dict[str, int] = {name: vocabulary[name] for name in names}

    def examples(self, conversations: Sequence[Conversation], stage: Stage, random: Random) -> list[Example]:
        """Examples of one epoch; those longer than the recipe allows are left out."""
        previous: Conversation | None = None
        made: list[Example] = []
        for conversation in conversations:
            example = self.example(conversation, stage, random, previous)
            if len(example.ids) <= self._recipe.max_tokens:
                made.append(example)
            if conversation.refused is None and len(conversation.prompt) < 120:
                previous = conversation
        return made

    def example(
        self, conversation: Conversation, stage: Stage, random: Random, previous: Conversation | None = None
    ) -> Example:
        """One example, sometimes with a system prompt or an earlier exchange in front, as the recipe says."""
        ids = [self._id[BOS]]
        is_prompt = [False]

        def add(tokens: Sequence[int], *, prompt: bool) -> None:
            ids.extend(tokens)
            is_prompt.extend([prompt] * len(tokens))

        end = [self._id[END]]
        if random.random() < self._recipe.with_system:
            add([self._id[SYSTEM], *self._text(random.choice(SYSTEM_PROMPTS)), *end], prompt=False)
        if previous is not None and random.random() < self._recipe.with_history:
            add([self._id[USER], *self._text(previous.prompt.strip()), *end], prompt=False)
            add([self._id[ASSISTANT], *self._text(previous.text), *end], prompt=False)
        add([self._id[USER]], prompt=False)
        add(self._text(conversation.prompt.strip()), prompt=True)
        add([*end, self._id[ASSISTANT]], prompt=False)
        first = len(ids)
        if stage.has_tokens:
            refused = conversation.refused
            add([self._id[CATEGORY_TOKENS[refused] if refused else RESPOND]], prompt=False)
        answer = self._text(conversation.text)
        is_whole = len(answer) <= self._recipe.max_answer_tokens
        add(answer[: self._recipe.max_answer_tokens], prompt=False)
        if is_whole:
            add(end, prompt=False)
        weights = [stage.prompt_weight] * first + [1.0] * (len(ids) - first)
        weights[first] = stage.decision_weight
        return Example(ids, weights, is_prompt)

    def _text(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]


def batched(examples: Sequence[Example], tokens: int, random: Random) -> list[list[Example]]:
    """Group examples of like length so that no padded batch exceeds `tokens`; the order of batches is random."""
    ordered = sorted(examples, key=lambda example: (len(example.ids), random.random()))
    batches: list[list[Example]] = [[]]
    for example in ordered:
        if batches[-1] and len(example.ids) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(example)
    random.shuffle(batches)
    return batches


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 5 % of the peak."""
    if step < stage.warmup:
        return stage.peak * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, steps - stage.warmup)
    return stage.peak * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def tensors_of(
    batch: Sequence[Example], *, padding: int, vocabulary: int, corrupted: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [B, S], targets [B, S] and weights [B, S] float32 of a batch; padding weighs nothing.

    Padding is on the right and attention is causal, so no mask is needed: no real token sees padding.
    """
    import torch

    length = max(len(example.ids) for example in batch)
    targets = torch.full((len(batch), length), padding, dtype=torch.long)
    weights = torch.zeros((len(batch), length))
    may_change = torch.zeros((len(batch), length), dtype=torch.bool)
    for row, example in enumerate(batch):
        targets[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
        may_change[row, : len(example.ids)] = torch.tensor(example.is_prompt)
    noise = torch.rand(targets.shape, generator=generator) < corrupted
    random_ids = torch.randint(0, vocabulary, targets.shape, generator=generator)
    inputs = torch.where(noise & may_change, random_ids, targets)
    return inputs, targets, weights


def weighted_loss(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, weighted; the first column of `targets` has nothing to predict it.

    Logits are made only where the target weighs something: a quarter of the work is in them.
    """
    from torch.nn.functional import cross_entropy

    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    losses = cross_entropy(model.lm_head(hidden[counts]), targets[:, 1:][counts], reduction="none")
    kept = weights[:, 1:][counts]
    return (losses * kept).sum() / kept.sum()


def run_stage(
    stage: Stage,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    *,
    recipe: Recipe,
    scale: float = 1.0,
) -> LlamaForCausalLM:
    """Train one stage, or go on where its checkpoint in `work` stopped, and return the model in float32.

    Args:
        work: folder of checkpoints (`<stage>.pt`) and loss logs (`<stage>.jsonl`).
        scale: multiplies the stage's epochs; below 1 for a quick trial.
    """
    import torch
    from tqdm import tqdm

    encoder = Encoder(tokenizer, recipe)
    epochs = stage.epochs * scale
    plan: list[list[Example]] = []
    steps = 0
    for number in range(math.ceil(epochs)):
        random = Random(f"{recipe.seed}/{stage.name}/{number}")
        examples = encoder.examples(corpus.epoch(recipe.seed + _offset(stage), number), stage, random)
        batches = batched(examples, recipe.tokens_per_batch, random)
        plan += batches
        steps += round(len(batches) * min(1.0, epochs - number))
    model, optimizer, start = _restore(stage, tokenizer, work, recipe)
    last = steps if stage.cut_at is None else min(steps, max(1, round(stage.cut_at * scale)))
    log = work / f"{stage.name}.jsonl"
    model.train()
    with log.open("a", encoding="utf-8") as stream, tqdm(total=last, initial=start, desc=stage.name) as bar:
        for step in range(start, last):
            generator = torch.Generator().manual_seed(recipe.seed * 1000 + _offset(stage) * 100_003 + step)
            inputs, targets, weights = tensors_of(
                plan[step],
                padding=int(model.config.pad_token_id or 0),
                vocabulary=model.config.vocab_size,
                corrupted=recipe.corrupted,
                generator=generator,
            )
            rate = learning_rate(stage, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = weighted_loss(model, inputs, targets, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            value = loss.item()
            stream.write(json.dumps({"step": step, "loss": round(value, 4), "rate": rate}) + "\n")
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value:.3f}")
            if (step + 1) % recipe.save_every == 0 or step + 1 == last:
                stream.flush()
                _save(stage, model, optimizer, step + 1, work)
    model.eval()
    return model


def facts(recipe: Recipe) -> dict[str, Any]:
    """Hyper-parameters for the card."""
    return {"recipe": asdict(recipe), "stages": [asdict(stage) for stage in STAGES]}


def _offset(stage: Stage) -> int:
    return [known.name for known in STAGES].index(stage.name)


def _restore(
    stage: Stage, tokenizer: PreTrainedTokenizerFast, work: Path, recipe: Recipe
) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, int]:
    """Model, optimizer and next step: from the stage's checkpoint, else from its parent's end, else from the seed."""
    import torch
    from transformers import LlamaForCausalLM

    from steering.demo.model import demo_config

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(demo_config(tokenizer)).float()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=stage.peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    own = work / f"{stage.name}.pt"
    if own.is_file():
        state = torch.load(own, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return model, optimizer, int(state["step"])
    if stage.parent is not None:
        model.load_state_dict(torch.load(work / f"{stage.parent}.pt", weights_only=True)["model"])
    return model, optimizer, 0


def _save(stage: Stage, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, work: Path) -> None:
    import torch

    fresh = work / f".{stage.name}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, fresh)
    fresh.replace(work / f"{stage.name}.pt")
