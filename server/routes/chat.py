"""Chat completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.generation import Asked, answer
from server.wire.chat import ChatRequest
from server.wire.parsing import parse
from server.wire.shape import ChatShape

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, steered as its `steering` field says."""
    return await answer(request, _asked)


def _asked(body: bytes) -> Asked:
    parsed = parse(ChatRequest, body)
    return Asked([parsed.to_generation()], bool(parsed.stream), ChatShape())
