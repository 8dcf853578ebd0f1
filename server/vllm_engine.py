"""The engine seam over vLLM: its `AsyncLLM` and its own endpoints, in this process.

Chat templates, tools, structured output, logprobs and streaming are vLLM's. Of `server` only this module,
`server/vllm_options.py` and `server/vllm_metrics.py` name vLLM.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import from_json

from server.cores import go_before_the_scheduler
from server.engine import Call, Chunk, Completion, Prompting, ServedModel, WorkerReport
from server.vllm_metrics import exposition, generated_tokens
from server.vllm_shapes import as_chat, chunk_of, echo_of, plain_chat, plain_completion, prompt_of, report_of
from steering.bundle import load_bundle
from steering.engine.outcomes import OutcomeListener, listen
from steering.engine.plugin import engine_arguments
from steering.engine.roster import BundleNames
from steering.errors import (
    EngineDied,
    EngineError,
    EngineOverloaded,
    InvalidSpec,
    NotSupported,
    TrimtabError,
    UnknownModel,
    UnknownName,
    UnsupportedConfiguration,
)
from steering.outcome import Outcome, Response
from steering.plan import PLAN_KEY

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

RPC_PATIENCE = 30.0
"""Seconds for a worker to say something of itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """VLLM's own endpoints, which the gateway calls in this process."""

    chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    tokenization: ServingTokenization


class VllmEngine:
    """`server.engine.Engine` over a running `AsyncLLM`; made by `started`."""

    def __init__(
        self, client: EngineClient, endpoints: Endpoints, listener: OutcomeListener, model: ServedModel
    ) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        self._client = client
        self._endpoints = endpoints
        self._listener = listener
        self._model = model
        self._loading = asyncio.Lock()  # each takes several calls, which others must not come between
        self._request_classes: dict[Prompting, Any] = {
            Prompting.CHAT: ChatCompletionRequest,
            Prompting.PLAIN: CompletionRequest,
        }
        self._error_class = ErrorResponse
        self._given = 0

    @property
    def model(self) -> ServedModel:
        """What is served."""
        return self._model

    @property
    def is_alive(self) -> bool:
        """False once the engine process is gone."""
        return not self._client.errored

    @property
    def generated(self) -> float:
        """As vLLM counts them, which it does as they are made; where it counts none, those that came through here."""
        return max(self._given, generated_tokens())

    async def complete(self, call: Call) -> Completion:
        """Generate a whole answer; see `server.engine.Engine`."""
        result = await self._answer(call, stream=False)
        if isinstance(result, self._error_class):
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # vLLM answers a cancellation with an error response
                raise asyncio.CancelledError
            raise self._rejection(call) or _from_response(result.error.model_dump())
        tokens = tuple(choice.token_ids or () for choice in result.choices)
        self._given += sum(map(len, tokens))
        if call.prompting is Prompting.CHAT:
            body = plain_chat(result)
        else:
            body = plain_completion(result, await self._echoed(call))
        return Completion(body=body, tokens=tokens, prompt=prompt_of(result))

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Generate an answer piece by piece; see `server.engine.Engine`."""
        events = await self._answer(call, stream=True)
        if isinstance(events, self._error_class):
            raise self._rejection(call) or _from_response(events.error.model_dump())
        echoed, told = None, set[int]()
        async with aclosing(events):
            async for event in events:
                payload = event.removeprefix("data: ").strip()
                if payload == "[DONE]":
                    return
                body = from_json(payload)
                if "error" in body:
                    raise self._rejection(call) or _from_response(body["error"])
                if call.prompting is Prompting.CHAT:
                    chunk = chunk_of(body)
                    self._given += len(chunk.tokens)
                    yield chunk
                    continue
                for choice in body["choices"]:
                    if call.fields.get("echo") and choice["index"] not in told:
                        echoed = echoed if told else await self._echoed(call)
                        told.add(choice["index"])
                        yield echo_of(body, echoed or "")
                chunk = chunk_of(as_chat(body))
                self._given += len(chunk.tokens)
                yield chunk

    async def outcomes(self, plan_id: str, samples: Collection[int], wait: float) -> Mapping[int, Outcome]:
        """Wait until these samples of a plan have reported; see `server.engine.Engine`."""
        return await self._listener.wait(plan_id, samples, wait)

    def responses(self, plan_id: str) -> Mapping[int, Response]:
        """What the response probe has read; see `server.engine.Engine`."""
        return self._listener.responses(plan_id)

    def forget(self, plan_id: str) -> None:
        """Drop what was reported under a plan."""
        self._listener.forget(plan_id)

    async def tokenize(self, fields: Mapping[str, Any], prompting: Prompting) -> Sequence[int]:
        """The token ids of a prompt; see `server.engine.Engine`."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

        wanted = TokenizeChatRequest if prompting is Prompting.CHAT else TokenizeCompletionRequest
        known = {name: value for name, value in fields.items() if name in wanted.model_fields}
        try:
            result = await self._endpoints.tokenization.create_tokenize(wanted.model_validate(known), None)  # type: ignore[arg-type] # reads headers, if any
        except Exception as error:
            raise self._explained(error) from error
        if isinstance(result, self._error_class):
            raise _from_response(result.error.model_dump())
        return result.tokens

    async def _echoed(self, call: Call) -> str | None:
        """Text of a plain prompt that is to be told; vLLM leaves it out of answers that carry token ids."""
        from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest

        prompt = call.fields["prompt"]
        if not call.fields.get("echo") or isinstance(prompt, str):
            return prompt if call.fields.get("echo") else None
        request = DetokenizeRequest(model=self._model.name, tokens=prompt)
        result = await self._endpoints.tokenization.create_detokenize(request, None)  # type: ignore[arg-type] # as above
        if isinstance(result, self._error_class):
            raise _from_response(result.error.model_dump())
        return str(result.prompt)

    async def reports(self) -> Sequence[WorkerReport]:
        """One per worker."""
        return [report_of(facts) for facts in await self._ask("steering_report")]

    async def clear_witness(self) -> None:
        """Forget, in every worker, which layers ran with an edit."""
        await self._ask("steering_clear_witness")

    async def load(self, path: Path) -> str:
        """Have every worker load a bundle, then let requests name it; see `server.engine.Engine`."""
        bundle = await asyncio.to_thread(lambda: load_bundle(path.resolve()))
        async with self._loading:
            if not await self._order("revive", bundle.digest):
                answers = await self._ask("steering_load", str(bundle.path), bundle.digest)
                errors = [TrimtabError.from_fields(answer["error"]) for answer in answers if answer["error"]]
                if errors:
                    # One rank says what it is, the others that there was one.
                    raise next((error for error in errors if type(error) is not EngineError), errors[0])
                try:
                    await self._order("open", bundle.digest, BundleNames.of(bundle).to_fields())
                except EngineError:
                    # Perhaps only late. Orders are carried out in turn: what was opened is closed, and then released.
                    if not await self._order("close", bundle.digest):
                        await self._ask("steering_unload", bundle.digest)
                    raise
        return bundle.digest

    async def unload(self, digest: str) -> None:
        """Let no request name a bundle any more; see `server.engine.Engine`."""
        async with self._loading:
            if not await self._order("close", digest):
                raise UnknownName(f"no bundle {digest} is loaded", parameter="bundle")

    def exposition(self, *, is_open: bool = False) -> bytes:
        """VLLM's own metrics; see `server.engine.Engine`."""
        return exposition(is_open=is_open)

    async def _answer(self, call: Call, *, stream: bool) -> Any:
        """VLLM's answer to a call: a response, an error response, or a generator of events."""
        try:
            request = self._request(call, stream=stream)
            if call.plan is not None:
                self._listener.expect(call.plan.id)
            if call.prompting is Prompting.PLAIN:
                return await self._endpoints.completion.create_completion(request, _traced(call))
            return await self._endpoints.chat.create_chat_completion(request, _traced(call))
        except TrimtabError:
            raise
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            path = ".".join(str(item) for item in found["loc"])[:300]
            raise InvalidSpec(f"{path}: {found['msg'][:300]}", parameter=path, code="invalid_value") from None
        except Exception as error:
            raise self._rejection(call) or self._explained(error) from error

    def _rejection(self, call: Call) -> TrimtabError | None:
        """Why the scheduler did not run a call, such as a bundle unloaded meanwhile; vLLM says only that it failed."""
        return None if call.plan is None else self._listener.rejection(call.plan.id)

    def _request(self, call: Call, *, stream: bool) -> Any:
        fields = call.fields
        if "max_tokens" in fields and call.prompting is Prompting.CHAT:  # deprecated there, warns
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        fields["request_id"] = call.request_id
        fields["return_token_ids"] = True
        if stream:
            fields["stream"] = True
            fields["stream_options"] = {"include_usage": True}
        if call.plan is not None:
            fields["vllm_xargs"] = {PLAN_KEY: call.plan.to_json()}
        return self._request_classes[call.prompting].model_validate(fields)

    def _explained(self, error: Exception) -> TrimtabError:
        from vllm.entrypoints.serve import create_error_response
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError) or not self.is_alive:
            return EngineDied("the engine is gone; this server must be started again")
        return _from_response(create_error_response(error).error.model_dump())

    async def _order(self, order: str, digest: str, names: Mapping[str, Any] | None = None) -> bool:
        """Have the scheduler carry out an order; `SteeringScheduler.__call__` says why it can be called."""
        try:
            async with asyncio.timeout(RPC_PATIENCE):
                core: Any = self._client.engine_core  # type: ignore[attr-defined] # of AsyncLLM
                return bool(await core.call_utility_async("scheduler", order, digest, names))
        except Exception as error:
            raise EngineError(f"the scheduler does not answer the order to {order} bundle {digest}: {error}") from error

    async def _ask(self, method: str, *arguments: str) -> list[Any]:
        try:
            answers: list[Any] = await self._client.collective_rpc(method, timeout=RPC_PATIENCE, args=arguments)
        except TrimtabError:
            raise
        except Exception as error:
            raise EngineError(f"the workers do not answer {method}: {error}") from error
        return answers


@asynccontextmanager
async def started(arguments: Namespace, bundles: Sequence[Path], **steering: Any) -> AsyncIterator[VllmEngine]:
    """A running engine that steers with these bundles.

    Args:
        arguments: of `parse_options`.
        bundles: folders, checked already.
        steering: other arguments of `engine_arguments`.

    Raises:
        OperatorError: vLLM or the plugin refuses the combination of model, bundles and options.
    """
    from starlette.datastructures import State
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client_from_engine_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if len(arguments.tool_parser_plugin) > 3:
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    if len(arguments.reasoning_parser_plugin) > 3:
        ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)
    async with AsyncExitStack() as stack:
        try:
            engine_args = AsyncEngineArgs.from_cli_args(arguments)
            for name, value in engine_arguments(bundles, is_reporting=True, **steering).items():
                setattr(engine_args, name, value)
            _check_ranks(engine_args.data_parallel_size)
            client = await stack.enter_async_context(build_async_engine_client_from_engine_args(engine_args))
            listener = OutcomeListener()
            listen(client, listener.receive)
            state = State()
            await init_app_state(client, state, arguments, await client.get_supported_tasks())
        except TrimtabError:
            raise
        except Exception as error:
            raise UnsupportedConfiguration(f"vLLM did not start, its own log says why: {error}") from error
        if state.openai_serving_chat is None or state.openai_serving_completion is None:
            raise UnsupportedConfiguration(f"model {arguments.model} does not generate text")
        endpoints = Endpoints(
            chat=state.openai_serving_chat,
            completion=state.openai_serving_completion,
            tokenization=state.serving_tokenization,
        )
        name = arguments.served_model_name[0]
        model = ServedModel(
            name=name,
            created=int(time.time()),
            context=client.vllm_config.model_config.max_model_len,
            is_chat=await _has_template(endpoints, name),
        )
        if client.vllm_config.device_config.device_type == "cpu":
            go_before_the_scheduler()
        yield VllmEngine(client, endpoints, listener, model)


async def _has_template(endpoints: Endpoints, model: str) -> bool:
    """Whether messages can be made a prompt; a template that fails for another reason is left to the self-check."""
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
    from vllm.renderers.chat_utils import ChatTemplateResolutionError

    request = TokenizeChatRequest.model_validate({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    try:
        await endpoints.tokenization.create_tokenize(request, None)  # type: ignore[arg-type] # as above
    except Exception as error:  # noqa: BLE001 - any other is met by the self-check, which tells it
        return not isinstance(error, ChatTemplateResolutionError)
    return True


def _check_ranks(data_parallel_size: int) -> None:
    """Refuse data parallelism by name: each rank of a dense model would take itself for the only one."""
    if data_parallel_size > 1:
        raise UnsupportedConfiguration(
            f"steering does not work with data_parallel_size={data_parallel_size}: start one server per GPU, behind a "
            "load balancer"
        )


def _traced(call: Call) -> Any:
    """What vLLM reads a request's trace context from: an HTTP request with these headers and nothing else."""
    from starlette.requests import Request

    if not call.trace:
        return None
    headers = [(name.encode(), value.encode("latin-1")) for name, value in call.trace.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}})


def _from_response(error: Mapping[str, Any]) -> TrimtabError:
    """VLLM's error object, whose `code` is the status, as one of ours."""
    message, status, parameter = str(error["message"])[:2000], int(error["code"]), error.get("param")
    if status == HTTPStatus.NOT_FOUND:
        return UnknownModel(message, parameter="model")
    if status == HTTPStatus.NOT_IMPLEMENTED:
        return NotSupported(message, parameter=parameter, code="not_supported")
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        if parameter is None:  # vLLM's sampling parameters are told without a field
            named = re.match(r"[a-z]+(_[a-z]+)+ ", message)
            parameter = "messages" if "out of vocabulary" in message else named and named.group().strip()
        is_too_long = "context length" in message or "model length" in message
        if is_too_long:  # vLLM names an internal parameter
            return InvalidSpec(message, parameter="messages", code="context_length_exceeded")
        return InvalidSpec(message, parameter=parameter, code="invalid_value")
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return EngineOverloaded(message)
    return EngineError(message)
