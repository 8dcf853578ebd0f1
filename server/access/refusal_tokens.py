"""Refusal tokens: fields of a request by which a client could reach past the gate, at the tokens a model refuses with.

A model that begins its refusals with tokens of their own (P1.1) refuses less where these are made unlikely, which needs
no steering at all. Models without such tokens say in words that they refuse, and what a client may do about words is
what it may do with any server: see README. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
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
    ids = _every_token(catalog)
    if not ids:
        return None
    fields = generation.fields
    for token, bias in (fields.get("logit_bias") or {}).items():
        if bias and int(token) in ids:
            return Touch("logit_bias", f"logit_bias of token {ids[int(token)]!r}")
        if bias > 0:
            return Touch("logit_bias", "a logit_bias above 0, which takes probability from the model's refusal tokens,")
    # Stop tokens are masked until there are `min_tokens`.
    stopped = sorted(token for token in fields.get("stop_token_ids") or () if token in ids)
    if stopped:
        return Touch("stop_token_ids", f"token {ids[stopped[0]]!r} among stop_token_ids")
    penalty = fields.get("repetition_penalty")
    if penalty is not None and penalty < 1:
        return Touch(
            "repetition_penalty", "a repetition_penalty below 1, which makes all words of the prompt likelier,"
        )
    guarded = guarded_of(generation, catalog)
    if guarded and _holds(generation, guarded.keys(), [ids[token] for token in guarded]):
        return next(iter(guarded.values()))
    return None


def guarded_of(generation: Generation, catalog: Catalog) -> Mapping[int, Touch]:
    """The tokens that no prompt may have of a client who may not lower refusals, and what is wrong with each there:
    those that begin answers, and those that begin refusals where a penalty makes all of the prompt's unlikely.
    """
    if generation.fields.get("repetition_penalty") in (None, 1):
        return _guarded(catalog, "messages" if "messages" in generation.fields else "prompt")
    refusing, answering = _tokens(catalog)
    what = "a repetition_penalty with the model's refusal tokens in the prompt"
    return dict.fromkeys([*refusing, *answering], Touch("repetition_penalty", what))


@functools.lru_cache(maxsize=64)
def _guarded(catalog: Catalog, parameter: str) -> Mapping[int, Touch]:
    """Without a penalty."""
    _, answering = _tokens(catalog)
    return {token: Touch(parameter, f"token {text!r} in a prompt") for token, text in answering.items()}


@functools.lru_cache(maxsize=64)
def _every_token(catalog: Catalog) -> Mapping[int, str]:
    """Texts by id of all of them."""
    refusing, answering = _tokens(catalog)
    return {**refusing, **answering}


@functools.lru_cache(maxsize=64)
def _tokens(catalog: Catalog) -> tuple[Mapping[int, str], Mapping[int, str]]:
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
    wanted = [text for text in texts if text]
    return any(text in reading for reading in _readings(generation.prompt_fields, wanted) for text in wanted)


def _readings(fields: Mapping[str, Any], wanted: Sequence[str]) -> Iterator[str]:
    """The texts of a prompt as a template may put them beside each other, by which a token's text may be spread.

    Contents alone, as templates show them one after another, and all that is the client's; each with nothing in between
    and with the line break by which vLLM joins parts, as sent and without the space around them that templates trim.
    """
    if isinstance(prompt := fields.get("prompt"), str):
        yield prompt
        return
    messages = fields.get("messages") or ()
    contents = [text for message in messages for text in _contents(message, is_rendered=True)]
    everything = [text for message in messages for text in _texts(message)] + _strings(fields.get("tools"))
    glues = ("", "\n") if any("\n" in text for text in wanted) else ("",)
    told: set[str] = set()
    for pieces in (contents, everything):
        for texts in (pieces, [text.strip() for text in pieces]):
            for glue in glues:
                reading = glue.join(texts)
                if reading not in told:
                    told.add(reading)
                    yield reading


def _texts(message: Mapping[str, Any]) -> list[str]:
    """All texts of a message that are the client's, in the order in which templates show them, if they do."""
    texts = [message[name] for name in ("name", "reasoning", "reasoning_content", "refusal") if message.get(name)]
    texts += _contents(message)
    for call in message.get("tool_calls") or ():
        texts += [call["id"], call["function"]["name"], *_unescaped(call["function"]["arguments"])]
    if message["role"] == "tool":
        texts += [message["tool_call_id"], *(text for part in _contents(message) for text in _unescaped(part))]
    return texts


def _contents(message: Mapping[str, Any], *, is_rendered: bool = False) -> list[str]:
    """The texts of a message's content, part by part.

    Args:
        message: of a conversation.
        is_rendered: without the line that vLLM takes out of system messages, a whole part where it has no other.
    """
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or ()
    texts = [part if isinstance(part, str) else part.get("text") or part.get("refusal") or "" for part in parts]
    if is_rendered and message["role"] == "system":
        return [text.partition("\n")[2] if text.startswith(_BILLING) else text for text in texts]
    return texts


_BILLING = "x-anthropic-billing-header"
"""What a line begins with that vLLM takes out of system messages (`renderers/chat_utils.py`, 0.32)."""


def _unescaped(text: str) -> list[str]:
    """A text, and what it says where it is JSON with escapes, which can hide a token: templates are given it parsed.

    It is read as one string, with something harmless for its quotes, since a value may have a million parts.
    """
    if "\\" not in text:
        return [text]
    try:
        return [text, json.loads('"' + text.replace('"', "/") + '"', strict=False)]
    except ValueError:  # no JSON, which engines take for nothing
        return [text]


def _strings(value: object) -> list[str]:
    """All texts of a JSON value in their order, and then its keys."""
    texts: list[str] = []
    keys: list[str] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, dict):
            keys.extend(node)
            waiting.extend(reversed(node.values()))
        elif isinstance(node, list | tuple):
            waiting.extend(reversed(node))
    return texts + keys
