"""The base of every model of what may enter: no coercion, no unknown keys, no NaN, no change afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Name = Annotated[str, Field(min_length=1, max_length=64)]
Identifier = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]
Ignored = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Name, Ignored], Field(max_length=16)]


class Strict(BaseModel):
    """A model that takes exactly what it names."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class Body(Strict):
    """The body of a request, with what its errors say.

    Attributes:
        refused: fields that other servers know and this endpoint refuses by name, with the reason. Those that are
            fields of the model as well may be null, which asks for nothing.
        ignored: fields that are accepted because clients send them to several servers, and do nothing here.
        forms: what a field of several forms may be, as pydantic would tell of one of them only; by path, such as
            `tools[].type`.
    """

    refused: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    forms: ClassVar[Mapping[str, str]] = {}


def at(path: str, message: str) -> PydanticCustomError:
    """An error of a combination; `path` names the field that `server/wire/parsing.py` reports."""
    return PydanticCustomError("combination", "{message}", {"message": message, "path": path})
