"""Keys: the operator's file of API keys, and who a presented key belongs to.

The file holds hashes alone. Keys are 256 random bits, so that a plain SHA-256 of one cannot be searched. Knows nothing
of HTTP, vLLM or torch.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from server.access.caller import Allowance, Caller, Permission
from server.wire.strict import Strict
from steering.errors import KeyFileError

PREFIX = "tt-"
RELOAD_INTERVAL = 1.0
"""Seconds for which the file is not looked at again."""

ALL = "*"
MAX_FILE_BYTES = 8 * 1024 * 1024
MAX_KEYS = 10_000

_WRITABLE_BY_OTHERS, _READABLE_BY_ALL = 0o022, 0o004
_log = logging.getLogger("trimtab")


def new_key() -> str:
    """A key: 256 random bits that look like nothing else."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _named(names: tuple[str, ...] | Literal["*"]) -> tuple[str, ...] | Literal["*"]:
    if isinstance(names, tuple) and ALL in names:
        raise PydanticCustomError("names", '"*" stands for all and not in a list')
    return names


Count = Annotated[int, Field(ge=1, le=2**53)]
Bound = Annotated[float, Field(ge=0, le=1000)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=201)], ...] | Literal["*"], AfterValidator(_named)
]


class StrengthBounds(Strict):
    """Least and greatest strength a key may ask for."""

    minimum: Bound
    maximum: Bound

    @model_validator(mode="after")
    def _ordered(self) -> StrengthBounds:
        if self.minimum > self.maximum:
            raise PydanticCustomError("bounds", "minimum must not be above maximum")
        return self


class KeyLimits(Strict):
    """How much a key may ask for; see `Allowance`. What is left out is not limited."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: Count | None = None
    max_tokens: Count | None = None


class KeyRecord(Strict):
    """One key of the file. What is left out is denied, but for limits, of which what is left out does not apply.

    Attributes:
        id: names the key in logs, audit and errors.
        sha256: of the key.
        tenant: keys of one tenant share the prefix cache.
        permissions: see `Permission`.
        profiles: that may be named beside the server's default; "*" for all.
        categories: that may be named; "*" for all.
        strength: bounds of the strength that may be asked for; the certified range where left out.
        limits: how much may be asked for.
        expires: when the key ends.
    """

    id: Id
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(min_length=1, max_length=128)]
    permissions: tuple[Permission, ...] = ()
    profiles: Names = ()
    categories: Names = ()
    strength: StrengthBounds | None = None
    limits: KeyLimits = KeyLimits()
    expires: AwareDatetime | None = None

    def to_caller(self) -> Caller:
        """Who comes with this key."""
        return Caller(
            key_id=self.id,
            tenant=self.tenant,
            permissions=frozenset(self.permissions),
            profiles=None if self.profiles == ALL else frozenset(self.profiles),
            categories=None if self.categories == ALL else frozenset(self.categories),
            strength=None if self.strength is None else (self.strength.minimum, self.strength.maximum),
            allowance=Allowance(
                requests=self.limits.requests_per_minute,
                tokens=self.limits.tokens_per_minute,
                concurrent=self.limits.concurrent,
                max_tokens=self.limits.max_tokens,
            ),
        )


class KeyFile(Strict):
    """The file of keys."""

    version: Literal[1]
    keys: Annotated[tuple[KeyRecord, ...], Field(max_length=MAX_KEYS)]

    @model_validator(mode="after")
    def _unique(self) -> KeyFile:
        for field in ("id", "sha256"):
            twice = [
                value for value, count in Counter(getattr(record, field) for record in self.keys).items() if count > 1
            ]
            if twice:
                raise PydanticCustomError("twice", "{message}", {"message": f"several keys have {field} {twice[0]}"})
        return self

    @property
    def needs_audit(self) -> bool:
        """Whether a key may do what must be on record."""
        return any({Permission.RELAX, Permission.ADMIN} & {*record.permissions} for record in self.keys)


def read_key_file(path: Path) -> KeyFile:
    """Read and check a file of keys.

    Raises:
        KeyFileError: not there, not to be trusted, or a field is wrong; names it, and never what a hash is.
    """
    try:
        mode = path.stat().st_mode
        if mode & _WRITABLE_BY_OTHERS:
            raise KeyFileError(
                f"{path} can be written by others than its owner (mode {mode & 0o777:04o}), who could make keys; run: "
                f"chmod 600 {path}"
            )
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the keys in {path}: {error.strerror}; see `trimtab key create`") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    try:
        found = KeyFile.model_validate_json(content)
    except ValidationError as error:
        facts = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:5])
        raise KeyFileError(f"{path}: {facts}") from error
    if mode & _READABLE_BY_ALL:
        _log.warning("%s can be read by everyone on this machine; run: chmod 600 %s", path, path)
    return found


@dataclass(frozen=True, slots=True)
class _Known:
    """A key in memory, ready to be compared with."""

    digest: bytes
    caller: Caller
    expires: datetime | None


class KeyRing:
    """The keys in force: those of the file, read again when it changes.

    A file that cannot be used any more changes nothing: the keys that were read last stay, since a half-written file
    must not lock everybody out. That is logged and counted.

    Args:
        path: of the file.
        is_audited: what must be on record is recorded; without, keys that may lower refusals or administer are refused.
        on_load: told of each reading after the first, and whether it succeeded.
        clock: monotonic seconds.
        now: the time of day, for expiry.

    Raises:
        KeyFileError: the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        is_audited: bool,
        on_load: Callable[[bool], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = path
        self._is_audited = is_audited
        self._on_load = on_load
        self._clock = clock
        self._now = now
        self._looked = clock()
        self._seen = self._state()
        self._keys = self._read()

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; None for a key that is not known or has expired.

        Every known key is compared, each in constant time, so that the time taken tells nothing.
        """
        self._refresh()
        presented = bytes.fromhex(hash_of(key))
        found: _Known | None = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, presented):
                found = known
        if found is None or (found.expires is not None and self._now() >= found.expires):
            return None
        return found.caller

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the keys in force."""
        return frozenset(known.caller.key_id for known in self._keys)

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < RELOAD_INTERVAL:
            return
        self._looked = now
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._keys = self._read()
        except KeyFileError as error:
            _log.error("the keys read last stay in force: %s", error.message)
            self._on_load(False)  # noqa: FBT003 - the one thing it is told
        else:
            _log.info("keys read again from %s: %d", self._path, len(self._keys))
            self._on_load(True)  # noqa: FBT003 - the one thing it is told

    def _state(self) -> tuple[int, int, int, int] | None:
        """What changes when the file does; follows links, as secrets are mounted."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode

    def _read(self) -> tuple[_Known, ...]:
        file = read_key_file(self._path)
        if file.needs_audit and not self._is_audited:
            raise KeyFileError(
                f"{self._path} has keys with steer:relax or admin, and what they do must be on record; name a log with "
                "TRIMTAB_AUDIT_LOG=FILE, or take these permissions away"
            )
        return tuple(
            _Known(digest=bytes.fromhex(record.sha256), caller=record.to_caller(), expires=record.expires)
            for record in file.keys
        )


def bearer(authorization: list[str]) -> str | None:
    """The key in the `Authorization` headers of a request; None unless there is one of the scheme `Bearer`."""
    if len(authorization) != 1:
        return None
    found = re.fullmatch(r"bearer +(\S+)", authorization[0].strip(), flags=re.IGNORECASE)
    return found.group(1) if found else None
