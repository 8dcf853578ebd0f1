"""Admission: from the headers of a request to its caller, where the caller may send one now.

Knows nothing of vLLM or torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.access.audit import AuditLog, read_secret
from server.access.caller import LOCAL, Caller, Permission
from server.access.keys import KeyRing, bearer
from server.access.permissions import require
from server.access.rate_limits import RateLimits, Refusal
from server.errors import InvalidKey, RateLimited
from server.observe.events import Observer
from steering.errors import UnsupportedConfiguration


class Noted(Protocol):
    """What a request's facts need to have for this; see `server.edge.Facts`."""

    caller: Caller | None
    key_id: str
    headers: dict[str, str]
    on_end: list[Callable[[], None]]


class Counting(Protocol):
    """Where it is counted; see `server.observe.metrics.Metrics`."""

    def keys_loaded(self, succeeded: bool) -> None:
        """The file of keys was read again."""
        ...

    def audit_recorded(self, event: str) -> None:
        """A record was written."""
        ...

    def audit_failed(self) -> None:
        """A record could not be written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOrder:
    """How access is configured.

    Attributes:
        keys: file of API keys; None lets whoever reaches the server do everything.
        audit_log: file of the audit; None where nothing is put on record.
        audit_secret: file of the secret by which prompts are hashed; None for one beside the log.
        audit_bytes, audit_files: see `AuditLog`.
    """

    keys: Path | None = None
    audit_log: Path | None = None
    audit_secret: Path | None = None
    audit_bytes: int = 64 * 1024 * 1024
    audit_files: int = 10


class Admission:
    """Who may send a request.

    Args:
        order: how it is configured.
        counting: where it is counted.

    Attributes:
        limits: what keys have left; to be told of requests that have ended.
        audit: the audit; None where nothing is put on record.

    Raises:
        KeyFileError: the file of keys cannot be used.
        AuditUnavailable: the audit cannot be written.
    """

    def __init__(self, order: AccessOrder, counting: Counting | None = None) -> None:
        self.limits = RateLimits()
        self.audit: AuditLog | None = None
        self._counting = counting
        if order.audit_log is not None:
            secret = order.audit_secret or order.audit_log.with_name(order.audit_log.name + ".secret")
            self.audit = AuditLog(
                order.audit_log,
                secret=read_secret(secret),
                most_bytes=order.audit_bytes,
                files=order.audit_files,
                on_record=lambda event: counting.audit_recorded(event) if counting else None,
                on_failure=lambda: counting.audit_failed() if counting else None,
            )
        elif order.audit_secret is not None:
            raise UnsupportedConfiguration("TRIMTAB_AUDIT_SECRET_FILE is of no use without TRIMTAB_AUDIT_LOG")
        self._keys = None
        if order.keys is not None:
            self._keys = KeyRing(order.keys, is_audited=self.audit is not None, on_load=self._on_load)

    @property
    def observers(self) -> Sequence[Observer]:
        """Who is to be told of requests that have ended."""
        return (self.limits,) if self.audit is None else (self.limits, self.audit)

    async def stop(self) -> None:
        """End, once all is on record."""
        if self.audit is not None:
            await self.audit.drain()
        self.close()

    def close(self) -> None:
        """End at once."""
        if self.audit is not None:
            self.audit.close()

    def admit(self, authorization: list[str], facts: Noted) -> Caller:
        """Let a request in: its key is known, and has something left of each of its limits.

        The second call for one request gives the same answer and takes nothing.

        Args:
            authorization: every header of that name.
            facts: get the caller, the headers that tell what is left, and what is to be done in the end.

        Raises:
            InvalidKey: no key, several, or none that is known here.
            RateLimited: a limit of the key is used up.
        """
        if facts.caller is not None:
            return facts.caller
        caller = self._caller(authorization)
        facts.key_id = caller.key_id
        refusal = self.limits.enter(caller)
        facts.headers.update(self.limits.headers(caller))
        if refusal is not None:
            facts.headers["retry-after"] = str(math.ceil(refusal.wait))
            raise _limited(caller, refusal)
        facts.caller = caller
        facts.on_end.append(lambda: self.limits.leave(caller))
        return caller

    def admit_operator(self, authorization: list[str], facts: Noted) -> Caller:
        """Let a request for administration in.

        Raises:
            InvalidKey, RateLimited: as `admit`.
            PermissionDenied: the key may not administrate.
        """
        caller = self.admit(authorization, facts)
        require(caller, Permission.ADMIN, "administration")
        return caller

    def _caller(self, authorization: list[str]) -> Caller:
        if self._keys is None:
            return LOCAL
        key = bearer(authorization)
        if key is None:
            raise InvalidKey("send an API key in one header: Authorization: Bearer tt-...", reason="no_key")
        caller = self._keys.caller(key)
        if caller is None:
            raise InvalidKey("this API key is not known here, or has expired", reason="wrong_key")
        return caller

    def _on_load(self, succeeded: bool) -> None:
        if self._counting is not None:
            self._counting.keys_loaded(succeeded)
        if succeeded and self._keys is not None:
            self.limits.forget(self._keys.ids)


def _limited(caller: Caller, refusal: Refusal) -> RateLimited:
    allowed = caller.allowance
    most = {
        "requests": f"{allowed.requests} requests a minute",
        "tokens": f"{allowed.tokens} tokens a minute",
        "concurrent": f"{allowed.concurrent} requests at once",
    }[refusal.reason]
    return RateLimited(
        f"key {caller.key_id!r} may have {most}; try again in {math.ceil(refusal.wait)} s", reason=refusal.reason
    )
