"""The server under evaluation, as `GET /v1/models` and `GET /v1/steering` describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai import APIError, AsyncOpenAI

from steering.errors import OperatorError


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server says of itself.

    Attributes:
        model: name to ask for.
        context: most tokens of prompt and answer; None where it does not say.
        version: of the server.
        bundles: label of each loaded bundle, which carries the beginning of its digest; the first is the default.
        profiles: names that may be asked for.
        gated: those of the default bundle that decide by themselves; None where the server does not say.
        default_profile: used where none is named.
        has_gate: mode `auto` may be asked for.
        tokens: category by the text of its refusal token, for a model that has such tokens.
    """

    model: str
    context: int | None
    version: str
    bundles: tuple[str, ...]
    profiles: tuple[str, ...]
    default_profile: str
    has_gate: bool
    tokens: Mapping[str, str]
    gated: tuple[str, ...] | None = None

    @property
    def has_decision_tokens(self) -> bool:
        """Whether the model begins an answer with a token that decides."""
        return bool(self.tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on beside the request: another model or bundle is another server."""
        return {"model": self.model, "bundles": list(self.bundles)}


async def describe(client: AsyncOpenAI) -> Server:
    """Ask a server what it serves.

    Raises:
        OperatorError: there is none, or none that steers.
    """
    try:
        model = (await client.models.list()).data[0]
        told = await client.get("/steering", cast_to=object)
    except APIError as error:
        raise OperatorError(
            f"no steering server at {client.base_url}: {error}; start one with `trimtab serve`"
        ) from error
    if not isinstance(told, dict) or not told.get("bundles"):
        raise OperatorError(f"the server at {client.base_url} has no bundle loaded: {str(told)[:200]}")
    context = (model.model_extra or {}).get("max_model_len")
    return Server(
        model=model.id,
        context=context if isinstance(context, int) else None,
        version=str(told.get("version", "")),
        bundles=tuple(bundle["label"] for bundle in told["bundles"]),
        profiles=tuple(told.get("profiles", ())),
        default_profile=str(told.get("default_profile", "")),
        has_gate="auto" in told.get("modes", ()),
        tokens={
            str(category["token"]): str(category["name"])
            for category in told["bundles"][0].get("categories", ())
            if category.get("token")
        },
        gated=_gated(told["bundles"][0]),
    )


def _gated(bundle: Mapping[str, Any]) -> tuple[str, ...] | None:
    profiles = bundle.get("profiles") or ()
    if not profiles or not all("modes" in profile for profile in profiles):
        return None
    return tuple(str(profile["name"]) for profile in profiles if "auto" in profile["modes"])
