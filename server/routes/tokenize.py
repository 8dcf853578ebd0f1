"""Tokenize: how many tokens a prompt has, before it is sent."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import JsonAnswer
from server.body import read_json_body, unless_disconnected
from server.engine import check_prompting
from server.gateway import gateway_of
from server.wire.parsing import parse
from server.wire.tokenize import TokenizeRequest
from steering.errors import UnknownModel

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The token ids of a prompt, as vLLM's own endpoint of this name tells them."""
    gateway = gateway_of(request)
    gateway.admit(request)
    body = await read_json_body(
        request.headers,
        request.receive,
        limit=gateway.settings.max_body_bytes,
        wait=gateway.settings.body_timeout,
    )
    asked = parse(TokenizeRequest, body)
    served = gateway.engine.model
    if asked.model not in (None, served.name):
        raise UnknownModel(f"model {asked.model!r} is not served here; models: [{served.name!r}]", parameter="model")
    check_prompting(served, asked.prompting)
    gateway.check_ready()
    work = gateway.engine.tokenize({**asked.engine_fields(), "model": served.name}, asked.prompting)
    tokens = await unless_disconnected(request.receive, work)
    return JsonAnswer(
        {"count": len(tokens), "max_model_len": served.context, "tokens": list(tokens), "token_strs": None}
    )
