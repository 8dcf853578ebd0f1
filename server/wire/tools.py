"""Tools that the model may call, as OpenAI's chat completions have them.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Literal

from server.wire.schemas import Schema
from server.wire.strict import Identifier, Strict

MAX_TOOLS = 128


class FunctionDefinition(Strict):
    """A function the model may call."""

    name: Identifier
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The one function the model must call."""

    name: Identifier


class NamedTool(Strict):
    """The one tool the model must use."""

    type: Literal["function"]
    function: NamedFunction
