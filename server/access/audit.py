"""The audit: who lowered refusals and who administered, one line of JSON each, before it is done.

What must be on record and cannot be written does not happen. Records hold no text: of a prompt there is a keyed hash,
by which two records of one prompt can be told to be of one. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic_core import to_json

from server.access.caller import Caller
from server.generation import Generation, Ticket
from server.observe.events import Ended
from server.policy import Resolution
from steering.errors import AuditUnavailable

RELAX, RELAX_ENDED, ADMIN = "relax", "relax_ended", "admin"
EVENTS = (RELAX, RELAX_ENDED, ADMIN)
"""Values of `event`: let in, ended, and an act of administration."""

SECRET_BYTES = 32
_OWNER_ONLY = 0o600
_log = logging.getLogger("trimtab")

Value = str | int | float | bool | None


class AuditLog:
    """An append-only file of records, rotated by size: `audit.jsonl`, then `audit.jsonl.1` and so on, oldest last.

    Each record is with the disk before the call returns. Another process may move the file away; a new one is begun.

    Args:
        path: of the file.
        secret: key of the prompts' hashes.
        most_bytes: of a file; then the next is begun.
        files: how many old ones are kept.
        on_record: told of each record, by event.
        on_failure: told of each that could not be written.
        now: the time of day.

    Raises:
        AuditUnavailable: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        secret: bytes,
        most_bytes: int = 64 * 1024 * 1024,
        files: int = 10,
        on_record: Callable[[str], None] = lambda _: None,
        on_failure: Callable[[], None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = path
        self._secret = secret
        self._most_bytes = most_bytes
        self._files = files
        self._on_record = on_record
        self._on_failure = on_failure
        self._now = now
        self._turn = threading.Lock()
        self._descriptor = -1
        self._is_torn = False
        self._ending: set[asyncio.Task[None]] = set()
        try:
            self._open()
        except OSError as error:
            raise AuditUnavailable(f"the audit log {path} cannot be written: {error.strerror}") from error

    async def let_in(self, ticket: Ticket, generation: Generation, resolution: Resolution) -> None:
        """Put on record that a request is let in which may lower refusals.

        Raises:
            AuditUnavailable: it cannot be written down, and so must not be answered.
        """
        await asyncio.to_thread(self._write, RELAX, self._facts(ticket, generation, resolution))

    async def admin(self, caller: Caller, request_id: str, act: str, **facts: Value) -> None:
        """Put on record that an act of administration is let in.

        Args:
            caller: whose.
            request_id: ours, without `req_`.
            act: what is done, such as `bundle_load`.
            facts: of the act, such as the bundle; no text of anybody's.

        Raises:
            AuditUnavailable: it cannot be written down, and so must not be done.
        """
        who = {"request_id": f"req_{request_id}", "key_id": caller.key_id, "tenant": caller.tenant}
        await asyncio.to_thread(self._write, ADMIN, {**who, "act": act, **facts})

    def ended(self, event: Ended) -> None:
        """Put on record how a request ended that was let in; as an observer, and so without waiting for the disk."""
        if not event.resolution.relaxes or event.ticket.is_internal or isinstance(event.error, AuditUnavailable):
            return
        facts = self._facts(event.ticket, event.generation, event.resolution)
        first = event.effects.get(0)
        if first is not None:
            facts |= {"decision": first.decision, "category": first.category, "applied": first.applied}
        facts |= {"complete": event.is_complete, "error": None if event.error is None else event.error.code}
        task = asyncio.get_running_loop().create_task(self._end(facts), name="audit")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def drain(self) -> None:
        """Wait until all that has ended is on record."""
        while self._ending:
            await asyncio.gather(*self._ending)

    def close(self) -> None:
        """Write no more."""
        with self._turn:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def hash_of(self, prompt: object) -> str:
        """The keyed hash of a prompt: the same for the same prompt, and nothing to anyone without the secret."""
        text = json.dumps(prompt, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=str)
        return hmac.digest(self._secret, text.encode(), "sha256").hex()

    async def _end(self, facts: Mapping[str, Value]) -> None:
        try:
            await asyncio.to_thread(self._write, RELAX_ENDED, facts)
        except AuditUnavailable as error:
            _log.error("request id=%s ended and is not on record: %s", facts["request_id"], error.message)

    def _facts(self, ticket: Ticket, generation: Generation, resolution: Resolution) -> dict[str, Value]:
        return {
            "request_id": f"req_{ticket.request_id}",
            "key_id": ticket.caller.key_id,
            "tenant": ticket.caller.tenant,
            "endpoint": ticket.endpoint,
            "prompt_number": ticket.number,
            "bundle": resolution.bundle.label,
            "profile": resolution.profile.name,
            "mode": resolution.mode.value,
            "category": resolution.category,
            "decision": None,
            "prompt_hmac": self.hash_of(generation.prompt),
        }

    def _write(self, event: str, facts: Mapping[str, Value]) -> None:
        """Append a record, and wait until the disk has it."""
        moment = self._now().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = to_json({"time": moment, "event": event, **facts}) + b"\n"
        try:
            with self._turn:
                self._follow(len(line))
                # A record of which a part was written must not become part of the next one.
                line = b"\n" + line if self._is_torn else line
                self._is_torn = True
                written = os.write(self._descriptor, line)
                if written != len(line):
                    raise OSError(0, f"{written} of {len(line)} bytes were written")  # noqa: TRY301 - as os.write's own
                self._is_torn = False
                os.fdatasync(self._descriptor)
        except OSError as error:
            self._on_failure()
            _log.error("the audit log %s cannot be written: %s", self._path, error.strerror)
            raise AuditUnavailable(
                "what this request asks for must be on record before it is done, and the record cannot be written; "
                "requests that lower no refusals are answered"
            ) from error
        self._on_record(event)

    def _follow(self, more: int) -> None:
        """Have the file open that lies at the path, with room for so many bytes more."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            found = None
        if self._descriptor >= 0 and found is not None:
            mine = os.fstat(self._descriptor)
            if (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino):
                if not found.st_size or found.st_size + more <= self._most_bytes:
                    return
                self._rotate()
        self._open()

    def _rotate(self) -> None:
        """Rename what is there, oldest first; what is one too many is overwritten."""
        for number in range(self._files, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _open(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _OWNER_ONLY)
        os.fchmod(self._descriptor, _OWNER_ONLY)


def read_secret(path: Path) -> bytes:
    """The key of the prompts' hashes in a file; made, for its owner alone, where there is none.

    Raises:
        AuditUnavailable: it cannot be read or made, or holds too little to be a secret.
    """
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER_ONLY)
        except FileExistsError:
            secret = path.read_bytes().strip()
        else:
            secret = secrets.token_hex(SECRET_BYTES).encode()
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret + b"\n")
    except OSError as error:
        raise AuditUnavailable(f"the secret of the audit log, {path}, cannot be read: {error.strerror}") from error
    if len(secret) < SECRET_BYTES:
        raise AuditUnavailable(f"{path} holds {len(secret)} bytes; a secret needs at least {SECRET_BYTES}")
    return secret
