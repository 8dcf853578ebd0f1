"""Completions: prompts as they are."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.generation import Asked, answer
from server.wire.completions import CompletionRequest
from server.wire.parsing import parse
from server.wire.shape import CompletionShape

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Go on from prompts, steered as the `steering` field says."""
    return await answer(request, _asked)


def _asked(body: bytes) -> Asked:
    parsed = parse(CompletionRequest, body)
    return Asked(parsed.to_generations(), bool(parsed.stream), CompletionShape(), {"messages": "prompt"})
