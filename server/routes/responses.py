"""Responses, of which nothing is kept."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.routes.generation import Asked, answer
from server.wire.parsing import parse
from server.wire.response_shape import ResponseShape
from server.wire.responses import ResponsesRequest

router = APIRouter()

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Answer input items, steered as the `steering` field says."""
    return await answer(request, _asked)


def _asked(body: bytes) -> Asked:
    parsed = parse(ResponsesRequest, body)
    return Asked([parsed.to_generation()], bool(parsed.stream), ResponseShape(parsed), _NAMES)
