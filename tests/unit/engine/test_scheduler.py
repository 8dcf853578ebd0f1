"""Scheduler: steered requests are set apart, and none is run that cannot be followed; over a fake of vLLM's own."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from steering.engine.finite import BROKEN_REQUESTS
from steering.engine.outcomes import REPORT_KEY
from steering.engine.prefix_cache import REPORTS, SteeringScheduler
from steering.engine.roster import RELEASED, BundleNames, Roster
from steering.errors import TrimtabError, UnknownName
from steering.outcome import Rejection, report_from_bytes
from steering.plan import PLAN_KEY, Plan, Reasoning, Scope
from tests.samples import DIGEST, gate_plan, plan_for
from tests.unit.engine.hashed import BLOCK, TOKENS, FakeRequest, Parameters, chained, keys


class FakeScheduler:
    """vLLM's scheduler, as far as it takes requests and tells of them."""

    def __init__(self) -> None:
        self.accepted: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.ended: set[str] = set()
        self.outputs: dict[int, FakeOutputs] = {}

    def add_request(self, request: FakeRequest) -> None:
        self.accepted.append(request)
        self.requests[request.request_id] = request

    def has_finished_requests(self) -> bool:
        return False

    def schedule(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(finished_req_ids=self.ended)

    def finish_requests(self, request_ids: list[str], status: str) -> None:
        assert status == "FINISHED_ERROR"
        for request_id in request_ids:
            del self.requests[request_id]
            self.ended.add(request_id)

    def update_from_output(self, scheduler_output: object, model_runner_output: object) -> dict[int, FakeOutputs]:
        del scheduler_output, model_runner_output
        outputs, self.outputs = self.outputs, {}
        return outputs


class Scheduler(SteeringScheduler, FakeScheduler):
    hash_block_size = BLOCK
    is_reporting = True

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster(
            {DIGEST: BundleNames(edits=frozenset({"e"}), gates={"gate": frozenset({"safety"})}, has_response=True)}
        )


@dataclass(slots=True, kw_only=True)
class FakeOutput:
    request_id: str
    new_token_ids: list[int]
    finish_reason: str
    kv_transfer_params: dict[str, list[bytes]] | None = None


@dataclass(slots=True, kw_only=True)
class FakeOutputs:
    outputs: list[FakeOutput] = field(default_factory=list)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scheduler takes of vLLM, by its import paths, so that vLLM need not be imported."""
    modules = {
        name: types.ModuleType(name) for name in ("vllm", "vllm.logger", "vllm.v1", "vllm.v1.engine", "vllm.v1.request")
    }
    modules["vllm.logger"].init_logger = logging.getLogger  # type: ignore[attr-defined]
    engine = {
        "EngineCoreOutput": FakeOutput,
        "EngineCoreOutputs": FakeOutputs,
        "FinishReason": types.SimpleNamespace(ERROR="error"),
    }
    vars(modules["vllm.v1.engine"]).update(engine)
    vars(modules["vllm.v1.request"]).update(RequestStatus=types.SimpleNamespace(FINISHED_ERROR="FINISHED_ERROR"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def submitted(plan_text: object, *, resumable: bool = False, caching: bool = True) -> tuple[Scheduler, FakeRequest]:
    """A request, with the keys vLLM gave it, and the scheduler it was given to."""
    extra = None if plan_text is None else {PLAN_KEY: plan_text, "other": 1}
    request = FakeRequest(tokens=TOKENS[:10], sampling_params=Parameters(extra_args=extra), resumable=resumable)
    if caching:
        request._block_hasher = chained
        request.update_block_hashes()
    scheduler = Scheduler()
    scheduler.add_request(request)
    return scheduler, request


def accepted(plan_text: object, *, resumable: bool = False, caching: bool = True) -> FakeRequest:
    """A request that the scheduler took, as vLLM's own `add_request` sees it."""
    scheduler, request = submitted(plan_text, resumable=resumable, caching=caching)
    assert scheduler.accepted == [request]
    assert not scheduler.has_finished_requests()
    return request


def test_a_steered_request_is_set_apart_before_it_can_be_scheduled() -> None:
    """Keys vLLM had made at construction are replaced by the isolated ones."""
    plan = plan_for("e", scope=Scope.ALL)
    assert accepted(plan.to_json()).block_hashes == keys(TOKENS[:10], plan, prompt=10)


def test_an_unsteered_request_is_vllms_own() -> None:
    """No plan, no difference: the hasher and the keys stay vLLM's; sessions that take more input later, too."""
    for resumable in (False, True):
        request = accepted(None, resumable=resumable)
        assert request._block_hasher is chained
        assert request.block_hashes == keys(TOKENS[:10], None, prompt=10)


@pytest.mark.parametrize(
    "plan",
    [gate_plan("gate", is_observed=True), structs.replace(plan_for("e"), edit=None, response=True)],
    ids=["gate", "response probe"],
)
def test_a_request_that_is_only_observed_is_vllms_own(plan: Plan) -> None:
    """Nothing is edited, so all its blocks are shared with everyone, answers included."""
    request = accepted(plan.to_json())
    assert request._block_hasher is chained
    assert request.block_hashes == keys(TOKENS[:10], None, prompt=10)


def test_a_request_whose_gate_may_edit_is_set_apart() -> None:
    """What the gate will decide is not known when blocks get their keys."""
    plan = gate_plan("gate")
    request = accepted(plan.to_json())
    request.tokens = TOKENS
    request.update_block_hashes()
    assert request.block_hashes == keys(TOKENS, plan, prompt=10)
    assert not set(request.block_hashes[2:]) & set(keys(TOKENS, None, prompt=10))


def test_requests_of_one_id_share_no_edited_block() -> None:
    """Ids come from clients, and vLLM can be told to leave them as they are."""
    scheduler, hashes = Scheduler(), []
    for strength in (1.0, -1.0):
        plan = plan_for("e", strength=strength)
        parameters = Parameters(extra_args={PLAN_KEY: plan.to_json()})
        request = FakeRequest(tokens=TOKENS[:9], request_id="same", sampling_params=parameters, _block_hasher=chained)
        scheduler.add_request(request)
        request.tokens = TOKENS
        request.update_block_hashes()
        hashes.append(request.block_hashes)
    assert hashes[0][:2] == hashes[1][:2]
    assert not set(hashes[0][2:]) & set(hashes[1])


def test_a_server_without_prefix_caching_needs_no_keys() -> None:
    """No hasher, no keys; the steered request is accepted."""
    assert accepted(plan_for("e").to_json(), caching=False).block_hashes == []


INVALID = {
    "no JSON": "not json",
    "empty": "",
    "a number": 5,
    "an object": {"id": "p"},
    "another edit": plan_for("absent").to_json(),
    "reasoning spared by a bundle that does not": structs.replace(plan_for("e"), reasoning=Reasoning.SPARED).to_json(),
    "another bundle": plan_for("e", bundle="sha256:other").to_json(),
    "a list as scope": plan_for("e").to_json().replace('"scope":"generated"', '"scope":["all"]'),
    "no float": plan_for("e").to_json().replace('"strength":1.0', '"strength":' + "9" * 400),
}


def assert_rejected(scheduler: Scheduler, request: FakeRequest) -> None:
    """Never scheduled; the engine is made to take a step, in which the client is told of an error, once."""
    assert scheduler.accepted == []
    assert scheduler.has_finished_requests()
    (ended,) = scheduler.update_from_output(None, None)[3].outputs
    assert (ended.request_id, ended.new_token_ids, ended.finish_reason) == (request.request_id, [], "error")
    assert not scheduler.has_finished_requests()
    assert scheduler.update_from_output(None, None) == {}


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID)
def test_a_plan_that_cannot_be_followed_ends_its_request_alone(text: object) -> None:
    """Invalid plans and names this engine lacks: never run unsteered, and never an error that stops the scheduler."""
    assert_rejected(*submitted(text))


@pytest.mark.usefixtures("vllm")
def test_a_session_that_takes_more_input_later_cannot_be_steered() -> None:
    """Its prompt length changes, so positions cannot be decided."""
    assert_rejected(*submitted(plan_for("e").to_json(), resumable=True))


def test_a_step_tells_the_ranks_what_is_released_after_the_last_request() -> None:
    """Closed while its request runs: nothing is told, and the engine is not kept busy. Once that ended, one step is
    taken for it, which names the bundle; the next does not.
    """
    scheduler, request = submitted(plan_for("e").to_json())
    assert scheduler("close", DIGEST)
    assert not scheduler.has_finished_requests()
    assert not hasattr(scheduler.schedule(), RELEASED)
    scheduler.ended.add(request.request_id)
    assert getattr(scheduler.schedule(), RELEASED) == (DIGEST,)
    assert not hasattr(scheduler.schedule(), RELEASED)
    assert scheduler("close", DIGEST) is False


def test_a_released_bundle_makes_an_idle_engine_take_a_step() -> None:
    """Nobody names it: the step comes without any request."""
    scheduler, _ = submitted(None)
    scheduler("close", DIGEST)
    assert scheduler.has_finished_requests()
    assert getattr(scheduler.schedule(), RELEASED) == (DIGEST,)
    assert not scheduler.has_finished_requests()


@pytest.mark.usefixtures("vllm")
def test_a_plan_that_names_a_bundle_being_unloaded_is_rejected() -> None:
    """Its request is ended; one accepted before stays."""
    scheduler, before = submitted(plan_for("e").to_json())
    scheduler("close", DIGEST)
    late = FakeRequest(
        tokens=TOKENS[:10],
        request_id="late",
        sampling_params=Parameters(extra_args={PLAN_KEY: plan_for("e").to_json()}),
    )
    scheduler.add_request(late)
    assert scheduler.accepted == [before]
    outputs = scheduler.update_from_output(None, None)
    assert [each.request_id for each in outputs[3].outputs] == ["late"]


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("is_reporting", [True, False])
def test_whoever_sent_a_rejected_request_is_told_why(is_reporting: bool) -> None:
    """By the plan's id and with the error's own class, where somebody listens; a plan that cannot be read has no id."""
    scheduler, _ = submitted("no plan")
    scheduler.is_reporting = is_reporting
    scheduler("close", DIGEST)
    plan = plan_for("e", plan_id="p")
    scheduler.add_request(
        FakeRequest(tokens=TOKENS[:10], sampling_params=Parameters(extra_args={PLAN_KEY: plan.to_json()}))
    )
    unread, told = scheduler.update_from_output(None, None)[3].outputs
    assert (unread.finish_reason, told.finish_reason) == ("error", "error")
    assert unread.kv_transfer_params is None
    if is_reporting:
        (rejection,) = map(report_from_bytes, (told.kv_transfer_params or {})[REPORT_KEY])
        assert isinstance(rejection, Rejection)
        assert rejection.plan_id == "p"
        error = TrimtabError.from_fields(rejection.error)
        assert isinstance(error, UnknownName)
        assert f"bundle {DIGEST} is being unloaded" in str(error)
    else:
        assert told.kv_transfer_params is None


def step(scheduler: Scheduler, reports: dict[str, list[bytes]] | None, *tokens: str) -> dict[str, list[bytes] | None]:
    """What goes with the tokens of a step, by request, after what a worker has told of it."""
    given = [FakeOutput(request_id=name, new_token_ids=[1], finish_reason="") for name in tokens]
    scheduler.outputs = {3: FakeOutputs(outputs=given)}
    told = types.SimpleNamespace() if reports is None else types.SimpleNamespace(**{REPORTS: reports})
    outputs = scheduler.update_from_output(None, told)[3].outputs
    return {each.request_id: (each.kv_transfer_params or {}).get(REPORT_KEY) for each in outputs}


@pytest.mark.usefixtures("vllm")
def test_reports_go_with_their_requests_next_token() -> None:
    """In the same step where it has one; else what was told meanwhile comes together, in order, and once."""
    scheduler = Scheduler()
    for name in ("a", "b"):
        scheduler.add_request(FakeRequest(tokens=TOKENS[:10], request_id=name))
    assert step(scheduler, {"a": [b"a"], "b": [b"b"]}, "a", "other") == {"a": [b"a"], "other": None}
    assert step(scheduler, {"b": [b"c", b"d"]}, "a") == {"a": None}
    assert step(scheduler, None, "a", "b") == {"a": None, "b": [b"b", b"c", b"d"]}
    assert step(scheduler, None, "a", "b") == {"a": None, "b": None}


@pytest.mark.usefixtures("vllm")
def test_nothing_is_kept_of_a_request_that_has_ended() -> None:
    """Whether it had a token in its last step or, as with asynchronous scheduling, is told of once it is gone."""
    scheduler = Scheduler()
    scheduler.add_request(FakeRequest(tokens=TOKENS[:10], request_id="a"))
    step(scheduler, {"a": [b"a"], "gone": [b"gone"]})
    assert list(scheduler._untold) == ["a"]
    del scheduler.requests["a"]
    assert step(scheduler, None, "b") == {"b": None}
    assert not scheduler._untold


@pytest.mark.usefixtures("vllm")
def test_where_nobody_listens_no_token_carries_a_report() -> None:
    """As under plain `vllm serve`, whose answers would show it."""
    scheduler = Scheduler()
    scheduler.is_reporting = False
    scheduler.add_request(FakeRequest(tokens=TOKENS[:10], request_id="a"))
    assert step(scheduler, {"a": [b"a"]}, "a") == {"a": None}
    assert not scheduler._untold


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("has_ended", [False, True])
def test_a_broken_request_is_ended_without_its_token_and_alone(has_ended: bool) -> None:
    """Running still, or at its end in this very step: its client gets an error with what is told of it and no token,
    the neighbour its own.
    """
    scheduler, request = submitted(plan_for("e").to_json())
    neighbour = FakeRequest(tokens=TOKENS[:5], request_id="neighbour")
    scheduler.add_request(neighbour)
    given = FakeOutput(request_id="neighbour", new_token_ids=[7], finish_reason="")
    broken = FakeOutput(request_id=request.request_id, new_token_ids=[0], finish_reason="length" if has_ended else "")
    scheduler.outputs = {3: FakeOutputs(outputs=[broken, given])}
    if has_ended:
        del scheduler.requests[request.request_id]
    reports = {request.request_id: [b"why"]}
    told = types.SimpleNamespace(**{BROKEN_REQUESTS: (request.request_id, "gone long ago"), REPORTS: reports})
    error = FakeOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason="error",
        kv_transfer_params={REPORT_KEY: [b"why"]},
    )
    assert scheduler.update_from_output(None, told) == {3: FakeOutputs(outputs=[given, error])}
    assert list(scheduler.requests) == ["neighbour"]


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("name", ["chatcmpl-1-0f3a-beam-0", "cmpl-1-0f3a-beam-12-9b2e0c1d"])
def test_beams_of_vllms_own_search_end_with_an_error(name: str) -> None:
    """VLLM's beam search makes its own parameters, without the plan of the request: it would run unsteered."""
    asked = Parameters(max_tokens=1, logprobs=4)
    request, scheduler = FakeRequest(tokens=TOKENS[:10], request_id=name, sampling_params=asked), Scheduler()
    scheduler.add_request(request)
    assert_rejected(scheduler, request)
    assert accepted(None).request_id == "r"


@pytest.mark.usefixtures("vllm")
def test_a_client_may_send_an_id_like_a_beams() -> None:
    """VLLM's own server makes a request's id of its `X-Request-Id`; an answer of several tokens is no beam."""
    request, scheduler = FakeRequest(tokens=TOKENS[:10], request_id="chatcmpl-job-beam-3-0a1b2c3d"), Scheduler()
    scheduler.add_request(request)
    assert scheduler.accepted == [request]
