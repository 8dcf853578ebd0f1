"""Refusal tokens: fields of a request by which a client could reach past the gate, at the tokens a model refuses with.

A model that begins its refusals with tokens of their own (P1.1) refuses less where these are made unlikely, which needs
no steering at all. Models without such tokens say in words that they refuse, and what a client may do about words is
what it may do with any server: see README. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from server.catalog import Catalog
from server.generation import Generation


class Touch(NamedTuple):
    """A field that touches the tokens, and what is wrong with it."""

    parameter: str
    what: str


def touch_of(generation: Generation, catalog: Catalog) -> Touch | None:
    """The first field that can make refusal tokens less likely; None for most requests.

    The tokens are the model's, so that those of every bundle count, whichever is asked for.
    """
    refusing, answering = _tokens(catalog)
    ids, texts = {**refusing, **answering}, [*refusing.values(), *answering.values()]
    if not ids:
        return None
    fields = generation.fields
    for token, bias in (fields.get("logit_bias") or {}).items():
        if bias and int(token) in ids:
            return Touch("logit_bias", f"logit_bias of token {ids[int(token)]!r}")
        if bias > 0:
            return Touch("logit_bias", "a logit_bias above 0, which takes probability from the model's refusal tokens,")
    # Stop tokens are masked until there are `min_tokens`.
    stopped = ids.keys() & {*(fields.get("stop_token_ids") or ())}
    if stopped:
        return Touch("stop_token_ids", f"token {ids[min(stopped)]!r} among stop_token_ids")
    penalty = fields.get("repetition_penalty")
    if penalty is not None and penalty < 1:
        return Touch(
            "repetition_penalty", "a repetition_penalty below 1, which makes all words of the prompt likelier,"
        )
    if penalty is not None and penalty != 1 and _holds(generation, ids.keys(), texts):
        return Touch("repetition_penalty", "a repetition_penalty with the model's refusal tokens in the prompt")
    if _holds(generation, answering.keys(), answering.values()):
        return Touch(
            "messages" if "messages" in fields else "prompt", f"token {next(iter(answering.values()))!r} in a prompt"
        )
    return None


def _tokens(catalog: Catalog) -> tuple[dict[int, str], dict[int, str]]:
    """Texts by id of the tokens that begin refusals, and of those that begin answers."""
    refusing = {
        category.token_id: category.token or category.name
        for bundle in catalog.bundles
        for category in bundle.categories.values()
        if category.token_id is not None
    }
    answering = {bundle.respond_id: bundle.respond or "" for bundle in catalog.bundles if bundle.respond_id is not None}
    return refusing, answering


def _holds(generation: Generation, ids: Any, texts: Any) -> bool:
    """Whether a prompt has one of the tokens, as a number or as the text that a tokenizer makes it of."""
    prompt = generation.prompt_fields.get("prompt")
    if isinstance(prompt, list):
        return bool(ids & {*prompt})
    # Parts of a message are joined by the template, so that a token's text may be spread over several.
    said = "".join(_strings(generation.prompt_fields))
    return any(text and text in said for text in texts)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
