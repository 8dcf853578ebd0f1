"""Callers: who sent a request, and what that key may do.

Plain values; where they come from is `server/access/keys.py`. Knows nothing of HTTP, files or vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MOST_TOKENS = ("max_tokens", "max_completion_tokens")
"""Fields that say how long an answer may be."""


class Permission(StrEnum):
    """What a key may do.

    `USE` names profiles, `RELAX` may lower refusals below what the server does by default, `CUSTOM` sets strength,
    thresholds and scope, `SCORES` reads what probes read, `ADMIN` loads and unloads bundles.
    """

    USE = "steer:use"
    RELAX = "steer:relax"
    CUSTOM = "steer:custom"
    SCORES = "scores:read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much a key may ask for; None is no limit.

    Attributes:
        requests: per minute.
        tokens: of prompts and answers, per minute.
        concurrent: being answered at once.
        max_tokens: of one answer; what asks for no number gets this one.
    """

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request.

    Attributes:
        key_id: names the key in logs and audit; never the key itself.
        tenant: keys of one tenant share the prefix cache, those of others do not; None shares with everyone.
        permissions: what the key may do.
        profiles: names that may be asked for, as `Catalog.profile_names` has them; None for all. The server's default
            profile can always be used.
        categories: names that may be asked for; None for all.
        strength: least and greatest strength that may be asked for; None leaves it to the certified range.
        allowance: how much may be asked for.

    An allow-list of profiles is a decision about each of them: a profile on it may be used as it is, even where its
    gate lowers refusals that the server's default would not. None is no such decision: it lets all of them be named.
    """

    key_id: str
    tenant: str | None = None
    permissions: frozenset[Permission] = frozenset()
    profiles: frozenset[str] | None = None
    categories: frozenset[str] | None = None
    strength: tuple[float, float] | None = None
    allowance: Allowance = field(default_factory=Allowance)


LOCAL = Caller(key_id="local", permissions=frozenset(Permission))
"""Whoever reaches a server without keys, which listens on the loopback interface only; and the server itself."""


def answer_tokens(caller: Caller, *, default: int, context: int, usual: int | None = None) -> int:
    """Most tokens of an answer whose request names no number: those of the key, or else `default`; no more than is
    `usual` at its endpoint.

    No more than the model's context, as the engine refuses a greater number; it cuts others to what a prompt leaves.
    """
    most = caller.allowance.max_tokens
    return min(context, default if most is None else most, context if usual is None else usual)


def bounded(fields: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Fields of a generation, with so many tokens at most where they name no number."""
    if any(fields.get(name) is not None for name in MOST_TOKENS):
        return dict(fields)
    return {**fields, MOST_TOKENS[0]: most}


def prefix_cache_salt(caller: Caller, own: str | None) -> str | None:
    """What keeps a request's blocks of the prefix cache apart: its tenant, and the client's own salt within that."""
    if caller.tenant is None and own is None:
        return None
    return hashlib.sha256(json.dumps([caller.tenant, own]).encode()).hexdigest()
