"""Residuals at the outputs of decoder blocks, and edits by hooks: the transformers reference of what the engine does.

Nothing is ever padded: exact for every architecture, hybrid ones too. Knows nothing of data sets or bundles.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steering.errors import NotSupported, OperatorError
from steering.fit.passes import MAX_GROUP, Sequences, passes
from steering.terms import Edit, LayerTerms, apply_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A causal language model with its tokenizer, in evaluation mode.

    Attributes:
        categories: refusal category to the id of its token, for the categories whose `[name]` is one token.
        respond: id of `[respond]`, None where the model has none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    categories: dict[str, int]
    respond: int | None

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks; their outputs are the residuals of layer 0, 1, ..."""
        blocks = self.model.get_decoder().layers
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return int(self.model.config.get_text_config().hidden_size)

    def prompt(self, text: str, *, system: str | None = None) -> list[int]:
        """Ids of the chat template up to and including the assistant's header."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(rendered), add_special_tokens=False))

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`prompt` for each text."""
        return [self.prompt(text) for text in texts]


def load_model(
    path: Path,
    categories: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> LoadedModel:
    """Load a local model folder and find the refusal tokens among `categories`.

    Args:
        dtype: of the weights in memory, and so of the residuals.
        device_map: as transformers takes it, such as `auto` to spread the blocks over every GPU; needs accelerate.

    Raises:
        OperatorError: no model in that folder, accelerate is missing for a device map, or it is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (path / "config.json").is_file():
        raise OperatorError(f"no model at {path}: config.json is missing; give a local model folder")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise OperatorError(
            f"device_map {device_map!r} needs the package accelerate; install it, or leave --device-map out"
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map).eval()
    except ValueError as error:
        raise OperatorError(f"the model at {path} cannot be loaded with device_map {device_map!r}: {error}") from error
    model.requires_grad_(requires_grad=False)
    vocabulary = tokenizer.get_vocab()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        categories={name: vocabulary[f"[{name}]"] for name in categories if f"[{name}]" in vocabulary},
        respond=vocabulary.get("[respond]"),
    )


def require_tokens(loaded: LoadedModel, categories: Sequence[str]) -> int:
    """The id of `[respond]`, once it is sure that the model has a token for each category.

    Raises:
        NotSupported: names the tokens that the model lacks.
    """
    missing = [f"[{name}]" for name in categories if name not in loaded.categories]
    if loaded.respond is None or missing:
        lacking = [*missing, *(["[respond]"] if loaded.respond is None else [])]
        raise NotSupported(
            f"{loaded.path} has no token for {lacking}; categorical directions need a model trained with refusal tokens"
        )
    return loaded.respond


def last_residuals(loaded: LoadedModel, sequences: Sequences) -> Tensor:
    """Residuals at the last token of each sequence, at the output of every block.

    Returns:
        [N, L, D] float32 on the CPU: for a few sequences at a time, as all layers of many are gigabytes.
    """
    return last_residuals_and_tokens(loaded, sequences)[0].transpose(0, 1).float()


@torch.inference_mode()
def last_residuals_at(loaded: LoadedModel, sequences: Sequences, layer: int) -> Tensor:
    """Residuals at the last token of each sequence, at the output of one block.

    Returns:
        [N, D] float32 on the CPU.
    """
    residuals = torch.empty(len(sequences), loaded.width)
    for indices, ids in passes(loaded, sequences):
        kept: dict[int, Tensor] = {}
        with _removed_after(loaded.blocks[layer].register_forward_hook(_keeper(kept, layer))):
            loaded.model.get_decoder()(input_ids=ids.to(loaded.model.device), use_cache=False)
        residuals[indices] = kept[layer].to("cpu", torch.float32)
    return residuals


@torch.inference_mode()
def last_residuals_and_tokens(
    loaded: LoadedModel, sequences: Sequences, most: int = MAX_GROUP
) -> tuple[Tensor, Tensor]:
    """Residuals at the last token of each sequence, at the output of every block, and the greedy next tokens.

    Args:
        most: sequences of one length that are run together at most.

    Returns:
        [L, N, D] in the model's dtype and [N] int64, on the CPU.
    """
    count = len(loaded.blocks)
    residuals = torch.empty(count, len(sequences), loaded.width, dtype=loaded.model.dtype)
    tokens = torch.empty(len(sequences), dtype=torch.int64)
    for indices, ids in passes(loaded, sequences, most, logits=1):
        with ExitStack() as stack:
            kept: dict[int, Tensor] = {}
            for layer, block in enumerate(loaded.blocks):
                stack.enter_context(_removed_after(block.register_forward_hook(_keeper(kept, layer))))
            output = loaded.model(input_ids=ids.to(loaded.model.device), use_cache=False, logits_to_keep=1)
        for layer in range(count):
            residuals[layer, indices] = kept[layer].to("cpu", residuals.dtype)
        tokens[indices] = output.logits[:, -1].argmax(dim=-1).cpu()
    return residuals, tokens


@torch.inference_mode()
def tail_residuals(loaded: LoadedModel, sequences: Sequences, layer: int, tail: int) -> Iterator[Tensor]:
    """Residuals [n, D] float32 at the last `tail` positions of sequences, at one block's output, batch by batch."""
    for _, ids in passes(loaded, sequences):
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append(_hidden(output)[:, -tail:].clone())

        with _removed_after(loaded.blocks[layer].register_forward_hook(keep)):
            loaded.model.get_decoder()(input_ids=ids.to(loaded.model.device), use_cache=False)
        yield kept[0].reshape(-1, loaded.width).float().cpu()


@torch.inference_mode()
def generated_residuals(
    loaded: LoadedModel,
    prompts: Sequences,
    answers: Sequences,
    *,
    layers: Sequence[int],
    most: int,
    edits: Sequence[Edit | None] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Residuals at the first generated tokens, at blocks' outputs and before an edit of the same block.

    An engine feeds in every generated token but the last, so the last of each answer is not read.

    Args:
        answers: generated tokens, the end token included where there is one.
        most: tokens of an answer that are read at most, G.
        edits: what each answer was generated under.

    Returns:
        By layer [N, G, D] in the model's dtype, zeros where there is no token; and which tokens there are, [N, G].
    """
    mask = torch.zeros(len(prompts), most, dtype=torch.bool)
    result = {layer: torch.zeros(len(prompts), most, loaded.width, dtype=loaded.model.dtype) for layer in layers}
    by_tail: dict[int, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        by_tail[min(most, len(answer) - 1)].append(index)
    for tail, members in sorted(by_tail.items()):
        if tail < 1:
            continue
        mask[members, :tail] = True
        joined = [[*prompts[index], *answers[index][:tail]] for index in members]
        for places, ids in passes(loaded, joined):
            rows = [members[place] for place in places]
            with ExitStack() as stack:
                kept: dict[int, Tensor] = {}
                # Registered before the edits, so that what is kept is what a block gave.
                for layer in layers:
                    hook = loaded.blocks[layer].register_forward_hook(_tail_keeper(kept, layer, tail))
                    stack.enter_context(_removed_after(hook))
                # Scope `generated`: the last prompt token and all after it.
                chosen = [None if edits is None else edits[row] for row in rows]
                stack.enter_context(steered_each(loaded, chosen, tail=tail + 1))
                loaded.model.get_decoder()(input_ids=ids.to(loaded.model.device), use_cache=False)
            for layer in layers:
                result[layer][rows, :tail] = kept[layer].to("cpu", loaded.model.dtype)
    return result, mask


@contextmanager
def steered(loaded: LoadedModel, edit: Edit | None, strength: float | Tensor = 1.0, *, tail: int = 1) -> Iterator[None]:
    """While inside, every forward pass edits the last positions of its input (scope `generated`); None edits nothing.

    Args:
        strength: one number, or one for each row of the batch [B].
        tail: positions edited, counted from the end: 1 while generating, more where an answer is fed in whole.
    """
    with ExitStack() as stack:
        for terms in edit.layers if edit is not None else ():
            hook = loaded.blocks[terms.layer].register_forward_hook(_editor(terms, strength, tail))
            stack.enter_context(_removed_after(hook))
        yield


@contextmanager
def steered_each(
    loaded: LoadedModel, edits: Sequence[Edit | None], strength: float | Tensor = 1.0, *, tail: int = 1
) -> Iterator[None]:
    """The same with an edit of its own for each row of the batch."""
    rows: dict[int, list[tuple[LayerTerms, list[int]]]] = defaultdict(list)
    for edit in {id(edit): edit for edit in edits if edit is not None}.values():
        members = [row for row, other in enumerate(edits) if other is edit]
        for terms in edit.layers:
            rows[terms.layer].append((terms, members))
    with ExitStack() as stack:
        for layer, parts in rows.items():
            hook = loaded.blocks[layer].register_forward_hook(_row_editor(parts, strength, tail))
            stack.enter_context(_removed_after(hook))
        yield


@contextmanager
def added_in_training(loaded: LoadedModel, layer: int, vector: Tensor, *, tail: int = 1) -> Iterator[None]:
    """While inside, `vector` [D], its gradient kept, is added to the last `tail` positions at one block's output."""

    def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _hidden(output)
        added = vector.to(device=hidden.device, dtype=hidden.dtype).expand(hidden.shape[0], tail, -1)
        edited = torch.cat([hidden[:, :-tail], hidden[:, -tail:] + added], dim=1)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    with _removed_after(loaded.blocks[layer].register_forward_hook(add)):
        yield


@torch.inference_mode()
def first_logits(loaded: LoadedModel, sequences: Sequences, edit: Edit | None = None, strength: float = 1.0) -> Tensor:
    """Logits of the first answer token of each prompt, [N, V] float32: for a few prompts at a time."""
    rows: list[Tensor] = [torch.empty(0)] * len(sequences)
    with steered(loaded, edit, strength):
        for indices, ids in passes(loaded, sequences, logits=1):
            output = loaded.model(input_ids=ids.to(loaded.model.device), use_cache=False, logits_to_keep=1)
            logits = output.logits[:, -1].float().cpu()
            for index, row in zip(indices, logits, strict=True):
                rows[index] = row
    return torch.stack(rows) if rows else torch.empty(0, 0)


def first_tokens(
    loaded: LoadedModel, sequences: Sequences, edit: Edit | None = None, strength: float = 1.0
) -> list[int]:
    """The greedy first answer token of each prompt."""
    return [answer[0] for answer in greedy(loaded, sequences, edit, strength, new_tokens=1)]


@torch.inference_mode()
def greedy(
    loaded: LoadedModel,
    sequences: Sequences,
    edit: Edit | Sequence[Edit | None] | None = None,
    strength: float | Tensor = 1.0,
    *,
    new_tokens: int = 48,
) -> list[list[int]]:
    """Greedy answers, each up to and including the end token, or `new_tokens` long.

    Args:
        edit: one for all, or one for each sequence.
        strength: one number, or one for each sequence [N].
    """
    end = loaded.tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in sequences]
    for indices, ids in passes(loaded, sequences, new=new_tokens, logits=1):
        shares = strength[indices] if isinstance(strength, Tensor) else strength
        with (
            steered(loaded, edit, shares)
            if edit is None or isinstance(edit, Edit)
            else steered_each(loaded, [edit[index] for index in indices], shares)
        ):
            current = ids.to(loaded.model.device)
            state: Any = None
            live = dict.fromkeys(indices)
            for _ in range(new_tokens):
                output = loaded.model(input_ids=current, past_key_values=state, use_cache=True, logits_to_keep=1)
                state = output.past_key_values
                current = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                for index, token in zip(indices, current[:, 0].tolist(), strict=True):
                    if index in live:
                        answers[index].append(token)
                        if token == end:
                            del live[index]
                if not live:
                    break
    return answers


@contextmanager
def _removed_after(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _keeper(kept: dict[int, Tensor], layer: int) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # A view would keep every position of every block until the pass ends.
        kept[layer] = _hidden(output)[:, -1].clone()

    return keep


def _tail_keeper(kept: dict[int, Tensor], layer: int, tail: int) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept[layer] = _hidden(output)[:, -tail:].clone()

    return keep


def _editor(terms: LayerTerms, strength: float | Tensor, tail: int) -> Any:
    shares = strength.unsqueeze(-1).expand(-1, tail) if isinstance(strength, Tensor) else strength

    def edit(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _hidden(output).clone()
        hidden[:, -tail:] = apply_terms(hidden[:, -tail:], terms, shares)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return edit


def _row_editor(parts: Sequence[tuple[LayerTerms, list[int]]], strength: float | Tensor, tail: int) -> Any:
    def edit(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _hidden(output).clone()
        for terms, rows in parts:
            shares = strength[rows].unsqueeze(-1).expand(-1, tail) if isinstance(strength, Tensor) else strength
            hidden[rows, -tail:] = apply_terms(hidden[rows, -tail:], terms, shares)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return edit
