"""Prefix cache: keeps edited key-value blocks apart (design rule 3).

A block may be shared only where it was computed by the same function of the same tokens. With `scope: generated` the
blocks that end before the last prompt token are those of the unsteered model and stay shared with everyone; every later
block gets a number of the request's own in its key, so that nobody else finds it, while the request itself finds it
again after a preemption. With `scope: all` every block gets the edit, its bundle's digest and its strength in its key.

Works on the scheduler's side of vLLM (`vllm.v1.request.Request._block_hasher`, 0.32), so plain `vllm serve` is covered
too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steering.engine.capture import capture_of
from steering.engine.finite import BROKEN_REQUESTS
from steering.engine.outcomes import REPORT_KEY
from steering.engine.parent import end_with_parent
from steering.engine.roster import RELEASED, BundleNames, Roster
from steering.errors import InvalidSpec, NotSupported, TrimtabError
from steering.outcome import Rejection, report_to_bytes
from steering.plan import PLAN_KEY, Plan, Scope

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

BlockHasher = Callable[[Any], list[Any]]

REPORTS = "trimtab_reports"
"""Attribute of vLLM's `ModelRunnerOutput`: lists of a step's reports, as bytes, by request."""

_BEAM = re.compile(r"-beam-\d+(-[0-9a-f]+)?$")
"""How vLLM's beam search ends the ids of its requests (0.32 `entrypoints/generate/beam_search`), and what vLLM adds."""


def _is_beam(request: Request) -> bool:
    """Whether vLLM's beam search made this request, out of one whose plan it dropped.

    A client may send an id that looks like it (`X-Request-Id`); a beam also asks for one token and its rivals.
    """
    parameters = request.sampling_params
    return (
        parameters is not None
        and parameters.max_tokens == 1
        and bool(parameters.logprobs)
        and _BEAM.search(request.request_id) is not None
    )


def plan_of(request: Any) -> tuple[str, Plan] | None:
    """What `Plan.shared` makes of the plan of a vLLM request or of its `NewRequestData`; None when it is unsteered.

    Raises:
        InvalidSpec: there is a plan and it is not valid.
    """
    parameters = request.sampling_params
    extra = parameters.extra_args if parameters is not None else None
    text = extra.get(PLAN_KEY) if extra else None
    return None if text is None else Plan.shared(text)


def _may_edit(plan: Plan) -> bool:
    """Whether any key or value may come out edited; a plan that only observes changes none."""
    return plan.edit is not None or (plan.gate is not None and not plan.gate.is_observed)


def set_apart(request: Request, *, plan: Plan, number: int, prompt_length: int, block_size: int) -> None:
    """Wrap vLLM's block hasher of one steered request, and set the hashes apart that it has made already.

    vLLM hashes a prompt when it makes the request; none of that is done again here.

    Args:
        request: its hasher hashes full blocks that have no hash yet, chained over the whole prefix; without one, as
            without prefix caching, nothing is done.
        plan: scope decides which blocks are set apart, and by what.
        number: of this sample, unique in this engine's life. Not vLLM's id of it, which is made of the client's and is
            unique by what vLLM adds at random; VLLM_DISABLE_REQUEST_ID_RANDOMIZATION switches that off.
        prompt_length: number of prompt tokens; the last of them is the first edited one under `scope: generated`.
        block_size: tokens per hash.
    """
    hasher: BlockHasher | None = request._block_hasher  # noqa: SLF001 - vLLM offers no public way to set one
    if hasher is None:
        return
    if plan.scope is Scope.ALL:
        first_edited, key = 0, f"all|{plan.bundle}|{plan.edit}|{plan.strength!r}"
    else:
        first_edited, key = prompt_length - 1, f"generated|{number}"
    apart = _Apart(hasher, first_edited // block_size, key, block_size)
    if request.block_hashes:
        request.block_hashes[:] = apart.apart(request.block_hashes)
    request._block_hasher = apart  # noqa: SLF001


class _Apart:
    """A block hasher of one request, around vLLM's own.

    Args:
        hasher: vLLM's.
        clean: blocks that are shared with everyone.
        key: of the others.
        block_size: tokens per hash.
    """

    __slots__ = ("_block_size", "_chain", "_clean", "_hasher", "_key")

    def __init__(self, hasher: BlockHasher, clean: int, key: str, block_size: int) -> None:
        self._hasher, self._clean, self._key, self._block_size = hasher, clean, key, block_size
        self._chain: list[Any] = []
        """VLLM's own hashes."""

    def apart(self, plain: Sequence[Any]) -> list[Any]:
        """The next hashes of vLLM's, set apart from the first block on that may be edited."""
        shared = max(self._clean - len(self._chain), 0)
        self._chain.extend(plain)
        salt = b"|" + self._key.encode()
        # Hashing vLLM's hash keeps what it already holds: all tokens so far, the tenant's salt, the parent block.
        return [*plain[:shared], *(hashlib.sha256(each + salt).digest() for each in plain[shared:])]

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the blocks that are full by now and have none; vLLM asks at every token."""
        if (len(self._chain) + 1) * self._block_size > request.num_tokens:
            return []
        # vLLM's hasher takes the last hash of the request as the parent of the next. It must find its own there, not
        # the one made of it here: a block's key would else depend on how many blocks were hashed at a time.
        ours, request.block_hashes = request.block_hashes, self._chain
        try:
            new = self._hasher(request)
        finally:
            request.block_hashes = ours
        return self.apart(new)


def _rejection(request: Request, error: TrimtabError) -> bytes | None:
    """Why a request is not run, which vLLM does not tell; None where its plan cannot be read, and so has no id."""
    with contextlib.suppress(TrimtabError):
        found = plan_of(request)
        if found is not None:
            return report_to_bytes(Rejection(plan_id=found[0], error=error.to_fields()))
    return None


class SteeringScheduler:
    """Mixed into vLLM's scheduler: sets a steered request's blocks apart before it can be scheduled.

    Attributes:
        roster: bundles that requests may name, and requests that name them.
        is_capturing: requests may ask for their residuals.
        is_reporting: whoever started the engine takes reports out of its outputs.
    """

    is_capturing: bool = False
    is_reporting: bool = False
    roster: Roster
    hash_block_size: int
    requests: dict[str, Request]

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not hasattr(self, "hash_block_size"):  # vLLM 0.25 takes it and does not keep it
            self.hash_block_size = arguments.get("hash_block_size") or arguments["block_size"]
        end_with_parent()  # of the engine's own process, which may hold no worker
        self._rejected: list[tuple[Request, bytes | None]] = []
        self._untold: dict[str, list[bytes]] = {}
        """What is known of requests and waits for a token of theirs to go with."""
        self._numbers = itertools.count()

    def __call__(self, order: str, digest: str, names: Mapping[str, Any] | None = None) -> bool:
        """Carry out an order of whoever loads bundles; see `Roster.obey`.

        vLLM's engine takes calls of its attributes by name (`EngineCoreProc._handle_client_request`, UTILITY, vLLM
        0.32), between steps and in the order of the requests, and the scheduler is such an attribute.
        """
        return self.roster.obey(order, digest, names)

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        """As vLLM's; the step also tells every rank which unloaded bundles no request names any more."""
        output = super().schedule(*arguments, **named)  # type: ignore[misc]
        self.roster.end(output.finished_req_ids)
        if self.roster.has_released:
            setattr(output, RELEASED, self.roster.take_released())
        return output

    def add_request(self, request: Request) -> None:
        """Accept a request; one whose plan is invalid or names what this engine lacks is ended, never run unsteered."""
        try:
            plan = self._checked_plan(request)
            self._check_capture(request)
        except TrimtabError as error:
            from vllm.logger import init_logger

            init_logger(__name__).error("request %s rejected: %s", request.request_id, error)
            self._rejected.append((request, _rejection(request, error)))
            return
        if plan is not None and plan.prompt_length is not None:
            # Of a prompt found in the cache only the last token is computed here, and this one's real end lies before.
            request.skip_reading_prefix_cache = True
        if plan is not None and _may_edit(plan):
            set_apart(
                request,
                plan=plan,
                number=next(self._numbers),
                prompt_length=plan.end_of_prompt(request.num_prompt_tokens),
                block_size=self.hash_block_size,
            )
        if plan is not None:
            self.roster.accept(request.request_id, plan.bundle)
        super().add_request(request)  # type: ignore[misc]

    def has_finished_requests(self) -> bool:
        """As vLLM's; what a step has to tell counts, so that the engine takes one: to the clients of rejected requests
        that they are, and to the ranks that bundles are released.
        """
        return bool(self._rejected) or self.roster.has_released or super().has_finished_requests()  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's, with an error for the client of each rejected request; it would else wait for ever. Those whose
        residuals are not finite are ended likewise, without the step's token.
        """
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        broken = getattr(model_runner_output, BROKEN_REQUESTS, ())
        if broken:
            self._end_broken(broken, outputs)
        for request, rejection in self._rejected:
            group = outputs.setdefault(request.client_index, EngineCoreOutputs())
            ended = EngineCoreOutput(request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
            if rejection is not None and self.is_reporting:
                ended.kv_transfer_params = {REPORT_KEY: [rejection]}
            group.outputs.append(ended)
        self._rejected.clear()
        reports = getattr(model_runner_output, REPORTS, None)
        if self.is_reporting and (reports or self._untold):
            self._report(reports or {}, outputs)
        return outputs

    def _report(self, reports: Mapping[str, list[bytes]], outputs: Mapping[int, Any]) -> None:
        """Put what a step made known of requests beside their tokens.

        A request whose prompt is given with its answer, or whose token vLLM dropped, has none in the step that made
        something known: that goes with its next.
        """
        untold = self._untold
        for request_id, told in reports.items():
            untold.setdefault(request_id, []).extend(told)
        for group in outputs.values():
            for output in group.outputs:
                if output.request_id in untold:
                    output.kv_transfer_params = {REPORT_KEY: untold.pop(output.request_id)}
        if untold:  # with asynchronous scheduling a step may tell of a request that has ended
            self._untold = {name: told for name, told in untold.items() if name in self.requests}

    def _end_broken(self, broken: Sequence[str], outputs: Any) -> None:
        from vllm.logger import init_logger
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.request import RequestStatus

        init_logger(__name__).error("requests %s ended: their residuals are not finite", list(broken))
        clients = {
            request_id: self.requests[request_id].client_index for request_id in broken if request_id in self.requests
        }
        self.finish_requests(list(clients), RequestStatus.FINISHED_ERROR)  # type: ignore[attr-defined]
        for client, group in outputs.items():
            # One that reached its end in this very step is not among the running ones any more.
            clients |= {each.request_id: client for each in group.outputs if each.request_id in broken}
            group.outputs = [each for each in group.outputs if each.request_id not in broken]
        for request_id, client in clients.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
            )

    def _checked_plan(self, request: Request) -> Plan | None:
        found = plan_of(request)
        if found is None:
            if _is_beam(request):
                raise NotSupported("vLLM's beam search drops the plan of a request; a steering engine runs none")
            return None
        _, plan = found
        plan.end_of_prompt(request.num_prompt_tokens)
        self.roster.check(plan)
        if request.resumable:
            raise NotSupported("a streaming-input session cannot be steered")
        return plan

    def _check_capture(self, request: Request) -> None:
        order = capture_of(request)
        if order is None:
            return
        if not self.is_capturing:
            raise NotSupported("this engine was started without capture; its operator names layers and a folder")
        if order.prompt_length is not None:
            if order.prompt_length > request.num_prompt_tokens:
                raise InvalidSpec(
                    f"capture: the prompt has {order.prompt_length} tokens, the request {request.num_prompt_tokens}"
                )
            # As for a plan: all tokens from the real end on have to be computed here.
            request.skip_reading_prefix_cache = True


def make_scheduler(*, vllm_config: VllmConfig, **arguments: Any) -> Any:
    """Make vLLM's own scheduler for this configuration, with `SteeringScheduler` mixed in.

    A function, so that one name serves both of vLLM's schedulers: `scheduler_cls` is resolved by
    `SchedulerConfig.get_scheduler_cls` and called by `EngineCore.__init__` (vLLM 0.32).
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from steering.engine.options import options_from

    options = options_from(vllm_config)
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    bundles = options.bundles if options is not None else ()
    made = {
        "roster": Roster({bundle.digest: BundleNames.of(bundle) for bundle in bundles}),
        "is_capturing": options is not None and options.capture is not None,
        "is_reporting": options is not None and options.is_reporting,
    }
    scheduler_class = type(f"Steering{base.__name__}", (SteeringScheduler, base), made)
    return scheduler_class(vllm_config=vllm_config, **arguments)
