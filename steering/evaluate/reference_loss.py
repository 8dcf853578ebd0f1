"""Next-token loss of reference answers with and without the edit that the served gate chose, through transformers.

The chat API gives no loss of a text that it did not write, so that this one number is computed beside it: what was
decided comes from the served answers, what it does to the loss from hooks. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from steering.evaluate.ability import mean_interval
from steering.evaluate.tally import Row, Rows
from steering.fit.activations import LoadedModel
from steering.terms import Edit, LayerTerms, apply_terms


def loss_change(
    loaded: LoadedModel, edits: Mapping[str, Edit], rows: Rows, longest: int, most: int = 200
) -> dict[str, Any]:
    """Mean loss per token of the sets' own answers, unsteered and as served.

    Args:
        edits: of the served bundle, by name.
        rows: answers of the gated arm; those whose record has a reference answer are used, at most `most`.
        longest: tokens of prompt and answer; the answer is cut there.

    Returns:
        Means with intervals, of the unsteered loss and of its change; empty without reference answers.
    """
    found = [row for row in rows if row.asked.record.answer and not row.asked.answer.error]
    chosen = found if len(found) <= most else [found[index * len(found) // most] for index in range(most)]
    pairs = [_losses(loaded, edits, row, longest) for row in chosen]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return {}
    steered = [after - before for before, after, is_edited in known if is_edited]
    return {
        "what": "mean negative log-likelihood per token of reference answers, by transformers in float32; the decision "
        "and edit for each prompt are those the served engine reported",
        "unsteered": mean_interval([before for before, _, _ in known]),
        "change": mean_interval([after - before for before, after, _ in known]),
        "change_where_edited": mean_interval(steered) if steered else None,
    }


@torch.inference_mode()
def _losses(loaded: LoadedModel, edits: Mapping[str, Edit], row: Row, longest: int) -> tuple[float, float, bool] | None:
    """Loss without and with the edit; None where nothing of the answer fits."""
    answer, record = row.asked.answer, row.asked.record
    prompt = loaded.prompt(record.prompt)
    begin = [] if loaded.respond is None else [loaded.respond]
    text = list(loaded.tokenizer.encode(record.answer or "", add_special_tokens=False))
    ids = [*prompt, *begin, *text][:longest]
    first = len(prompt) + len(begin)
    if first >= len(ids):
        return None

    def loss() -> float:
        given = torch.tensor([ids], device=loaded.model.device)
        logits = loaded.model(input_ids=given, use_cache=False).logits[0, first - 1 : -1].float()
        return float(nn.functional.cross_entropy(logits, given[0, first:]))

    before = loss()
    edit = edits.get(answer.edit or "")
    if edit is None or not answer.strength:
        return before, before, False
    with _edited_from(loaded, edit, answer.strength, len(prompt) - 1):
        return before, loss(), True


@contextmanager
def _edited_from(loaded: LoadedModel, edit: Edit, strength: float, position: int) -> Iterator[None]:
    """While inside, every position from `position` on is edited: scope `generated` of a whole sequence at once."""
    with ExitStack() as stack:
        for terms in edit.layers:
            stack.callback(loaded.blocks[terms.layer].register_forward_hook(_editor(terms, strength, position)).remove)
        yield


def _editor(terms: LayerTerms, strength: float, position: int) -> Any:
    def change(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, position:] = apply_terms(hidden[:, position:].flatten(0, 1), terms, strength).view_as(
            hidden[:, position:]
        )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return change


def reference_rows(rows: Sequence[Row], arm: str, suite: str) -> list[Row]:
    """Answers of one arm to one suite."""
    return [row for row in rows if row.asked.arm == arm and row.asked.suite.name == suite]
