"""The command line of API keys: `trimtab key create`, `list` and `revoke`, over the operator's file of hashes.

The server reads the file again when it changes. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import to_json

from server.access.caller import Permission
from server.access.keys import ALL, KeyFile, KeyRecord, hash_of, new_key, read_key_file
from steering.errors import KeyFileError

app = typer.Typer(no_args_is_help=True, help="Make and revoke API keys.")

File = Annotated[
    Path, typer.Option("--keys", envvar="TRIMTAB_KEYS_FILE", help="File of hashes; made where there is none.")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="ID", help="Names the key in logs, audit and errors.")],
    keys: File,
    tenant: Annotated[
        str | None, typer.Option(help="Keys of one tenant share the prefix cache; the key's own ID by default.")
    ] = None,
    permission: Annotated[list[Permission] | None, typer.Option(help="Repeatable; none by default.")] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Profile that may be named beside the default; repeatable, * for all.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Category that may be named; repeatable, * for all.")
    ] = None,
    strength: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Bounds of strength; the certified range by default.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of one answer.")] = None,
    expires: Annotated[datetime | None, typer.Option(help="When the key ends, UTC.")] = None,
) -> None:
    """Make a key and print it, once: the file holds its hash alone."""
    key = new_key()
    limits = {
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
        "concurrent": concurrent,
        "max_tokens": max_tokens,
    }
    fields: dict[str, Any] = {
        "id": name,
        "sha256": hash_of(key),
        "tenant": tenant or name,
        "permissions": [granted.value for granted in permission or ()],
        "profiles": ALL if profile == [ALL] else profile or [],
        "categories": ALL if category == [ALL] else category or [],
        "limits": limits,
    }
    if strength is not None:
        fields["strength"] = _bounds(strength)
    if expires is not None:
        fields["expires"] = expires.replace(tzinfo=UTC).isoformat()
    try:
        record = KeyRecord.model_validate_json(to_json(fields))
    except ValidationError as error:
        facts = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise KeyFileError(f"no such key can be made: {facts}") from error
    with _changed(keys) as records:
        if any(other.id == record.id for other in records):
            raise KeyFileError(f"{keys} has a key {record.id!r} already; revoke it first, or take another ID")
        records.append(record)
    print(key)


@app.command("list")
def list_keys(keys: File) -> None:
    """Tell what there is, a line a key."""
    for record in read_key_file(keys).keys:
        told = {
            "tenant": record.tenant,
            "permissions": ",".join(granted.value for granted in record.permissions) or "none",
            "profiles": _in_words(record.profiles),
            "categories": _in_words(record.categories),
            **{name: value for name, value in record.limits.model_dump().items() if value is not None},
        }
        if record.strength is not None:
            told["strength"] = f"{record.strength.minimum:g}:{record.strength.maximum:g}"
        if record.expires is not None:
            over = " (over)" if record.expires <= datetime.now(UTC) else ""
            told["expires"] = record.expires.isoformat() + over
        print(record.id, *(f"{name}={value}" for name, value in told.items()), sep="  ")


@app.command()
def revoke(name: Annotated[str, typer.Argument(metavar="ID", help="Of the key.")], keys: File) -> None:
    """Take a key away; a server that runs notices within a second or two."""
    with _changed(keys) as records:
        left = [record for record in records if record.id != name]
        if len(left) == len(records):
            raise KeyFileError(f"{keys} has no key {name!r}; keys: {[record.id for record in records]}")
        records[:] = left
    print(f"revoked {name}")


@contextmanager
def _changed(path: Path) -> Iterator[list[KeyRecord]]:
    """The records, to be changed, which are written in one step; one change at a time."""
    folder = path.absolute().parent
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        records = [*read_key_file(path).keys] if path.exists() else []
        yield records
        _write(path, KeyFile(version=1, keys=tuple(records)))
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _write(path: Path, file: KeyFile) -> None:
    content = to_json(file.model_dump(mode="json", exclude_none=True), indent=2) + b"\n"
    target = path.resolve()  # a link stays one
    handle, unfinished = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as written:
            written.write(content)
            written.flush()
            os.fsync(written.fileno())
        Path(unfinished).replace(target)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _bounds(text: str) -> dict[str, float]:
    least, _, most = text.partition(":")
    try:
        return {"minimum": float(least), "maximum": float(most)}
    except ValueError:
        raise KeyFileError(f"--strength must be two numbers such as 0:1.5, got {text!r}") from None


def _in_words(names: tuple[str, ...] | str) -> str:
    return names if isinstance(names, str) else ",".join(names) or "none"
