"""The engine seam: all that the gateway asks of whatever generates tokens.

Knows nothing of vLLM, torch or HTTP. `server/vllm_engine.py` implements it with vLLM, `tests/fakes.py` with a script.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steering.plan import Outcome, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The one model this server serves.

    Attributes:
        name: what clients send as `model`.
        created: seconds since 1970, when it was loaded.
        context: most tokens of prompt and answer together.
    """

    name: str
    created: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """One chat completion, checked and allowed.

    Attributes:
        request_id: ours, unique; the answer's `id` is `chatcmpl-` and this.
        fields: OpenAI request fields as JSON values, without `stream` and without what concerns the gateway alone.
            The engine may keep and change it.
        samples: the `n` of the request, 1 or more.
        plan: what the engine is to do to the residual stream; None leaves the request alone.
    """

    request_id: str
    fields: dict[str, Any]
    samples: int = 1
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer.

    Attributes:
        body: a `chat.completion` object; the receiver owns it.
        first_tokens: id of the first generated token by choice, in the order of `choices`; None where there is none.
    """

    body: dict[str, Any]
    first_tokens: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One piece of a streamed answer.

    Attributes:
        body: a `chat.completion.chunk` object of at most one choice; the last one has none and carries `usage`.
            The receiver owns it.
        tokens: ids generated since the choice's chunk before; empty for chunks that carry none, such as the role.
    """

    body: dict[str, Any]
    tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What the plugin in one worker says of itself.

    Attributes:
        version: of the plugin.
        architecture: class name of the model.
        runner: vLLM's model runner, `v1` or `v2`.
        hidden_size: width of the residual stream.
        layers: decoder blocks whose output the plugin can edit.
        bundles: names of the edits in the bank, by bundle digest.
        rows: how many requests can be steered at once.
        witness: layers whose op ran with an edit since the witness was last cleared.
    """

    version: str
    architecture: str
    runner: str
    hidden_size: int
    layers: tuple[int, ...]
    bundles: Mapping[str, tuple[str, ...]]
    rows: int
    witness: tuple[int, ...]


class Engine(Protocol):
    """Generates answers, steered or not, and says what it did.

    Methods raise errors of `steering.errors`, and nothing else on purpose: `CallerError` where the request is at fault,
    `EngineError` for the rest. Cancelling a coroutine, or closing a stream, aborts the generation.
    """

    @property
    def model(self) -> ServedModel:
        """The model that is served."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once the engine can answer nothing more."""
        ...

    async def complete(self, call: ChatCall) -> Completion:
        """Generate a whole answer."""
        ...

    def stream(self, call: ChatCall) -> AsyncGenerator[Chunk, None]:
        """Generate an answer piece by piece; the last chunk carries the usage."""
        ...

    async def outcomes(self, plan_id: str, count: int, wait: float) -> Sequence[Outcome]:
        """Wait until `count` samples of a plan have reported.

        Args:
            plan_id: the plan's `id`.
            count: how many samples must have reported.
            wait: seconds after which it is given up.

        Raises:
            EditNotApplied: fewer reported in time, or one reported that nothing was applied.
        """
        ...

    def forget(self, plan_id: str) -> None:
        """Drop what was reported under a plan; called once for every plan."""
        ...

    async def reports(self) -> Sequence[WorkerReport]:
        """One report per worker."""
        ...

    async def clear_witness(self) -> None:
        """Forget, in every worker, which layers ran with an edit."""
        ...

    def exposition(self) -> bytes:
        """The engine's own metrics in Prometheus' text format."""
        ...
