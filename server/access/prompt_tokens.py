"""Prompt tokens: whether a client has written, into the prompt as the model was given it, tokens it may not write.

`refusal_tokens.py` reads texts before the engine is asked. A template that takes something out, as some do with
earlier reasoning, may put pieces together again, and a tokenizer may take letters for others that look like them. So
the prompt's tokens are counted, and held against those of the same conversation without the client's words. Knows
nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.access.caller import Caller, Permission
from server.access.permissions import require
from server.access.refusal_tokens import Touch, guarded_of
from server.catalog import Catalog
from server.engine import Engine, Prompting
from server.generation import Generation
from steering.errors import CallerError

WORD = "x"
"""What stands for a client's text: a template shows it where it would have shown that."""

_TEXTS = ("content", "name", "reasoning", "reasoning_content", "refusal")


async def check_prompt(
    caller: Caller, generation: Generation, tokens: Sequence[int], catalog: Catalog, engine: Engine
) -> bool:
    """Whether a prompt may lower refusals by tokens that the client wrote into it, which the caller may then do.

    Args:
        caller: who asked.
        generation: for what.
        tokens: of its prompt, as the engine says; where it says nothing it is asked.
        catalog: whose refusal tokens are guarded.
        engine: renders.

    Raises:
        PermissionDenied: as for tokens that are found in the request's own texts.
    """
    guarded = guarded_of(generation, catalog)
    if not guarded or (tokens and guarded.keys().isdisjoint(tokens)):
        return False
    touch = await _written(generation, tokens, guarded, engine)
    if touch is not None:
        require(caller, Permission.RELAX, touch.what, parameter=touch.parameter)
    return touch is not None


async def _written(
    generation: Generation, tokens: Sequence[int], guarded: Mapping[int, Touch], engine: Engine
) -> Touch | None:
    """The first guarded token that is the client's; most prompts have none at all, and are looked at no further."""
    tokens = tokens or await engine.tokenize(generation.prompt_fields, generation.prompting)
    found = _counted(tokens, guarded)
    if not found:
        return None
    own = _counted(await _without_words(generation, engine), guarded)
    return next((guarded[token] for token, count in found.items() if count > own.get(token, 0)), None)


async def _without_words(generation: Generation, engine: Engine) -> Sequence[int]:
    """Tokens that the template puts there by itself; none where it takes no such conversation, as then all count."""
    if generation.prompting is Prompting.PLAIN:
        return ()
    try:
        return await engine.tokenize(wordless(generation.prompt_fields), generation.prompting)
    except CallerError:
        return ()


def wordless(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation of the same turns, without tools and without a word of the client's; a new object."""
    kept = {name: value for name, value in fields.items() if name not in ("messages", "tools", "tool_choice")}
    return {**kept, "messages": [_wordless(message) for message in fields["messages"]]}


def _wordless(message: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: _in_its_place(value) if name in _TEXTS else value for name, value in message.items()}
    if "tool_call_id" in told:
        told["tool_call_id"] = WORD * len(told["tool_call_id"])
    if told.get("tool_calls"):
        told["tool_calls"] = [
            # Some templates want ids of one length.
            {**call, "id": WORD * len(call["id"]), "function": {"name": WORD, "arguments": "{}"}}
            for call in told["tool_calls"]
        ]
    return told


def _in_its_place(value: Any) -> Any:
    """The word, once for each part that holds a text; what is empty stays so, since templates leave it out."""
    if isinstance(value, list):
        return [{**part, "text": WORD} if "text" in part else part for part in value]
    return WORD if value else value


def _counted(tokens: Sequence[int], guarded: Iterable[int]) -> dict[int, int]:
    present = set(guarded).intersection(tokens)
    return {token: sum(each == token for each in tokens) for token in sorted(present)}
