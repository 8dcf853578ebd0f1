"""Outcomes: what the engine tells whoever started it, received with the tokens that it is about.

A worker's reports (`steering.engine.worker`) go with the step's output to the scheduler, which puts each beside its
request's token (`steering.engine.prefix_cache`); here they are taken out again, before vLLM hands that token on. So
whoever has a token has its outcome: nothing is sent, waited for or lost on a way of its own. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steering.errors import EditFailed, EditNotConfirmed, TrimtabError
from steering.outcome import Outcome, Rejection, Report, Response, report_from_bytes

_log = logging.getLogger("trimtab")

REPORT_KEY = "trimtab"
"""In an `EngineCoreOutput`'s `kv_transfer_params` (vLLM 0.32), its one field that may hold anything: a list of bytes,
one for each report. Nobody else's use is disturbed: engines that transfer keys and values are refused."""


def listen(engine: Any, receive: Callable[[Report], None]) -> None:
    """Have every report of an engine received, each before the token that it came with.

    Args:
        engine: vLLM's `AsyncLLM` or `LLMEngine`, started with `engine_arguments(..., is_reporting=True)`.
        receive: called in the thread that takes tokens.
    """
    processor = engine.output_processor
    processor.__class__ = type(f"Listening{type(processor).__name__}", (_ListeningProcessor, type(processor)), {})
    processor.trimtab_receive = receive


class _ListeningProcessor:
    """Mixed into the class of vLLM's `OutputProcessor`, once it is made."""

    trimtab_receive: Callable[[Report], None]
    request_states: Mapping[str, Any]

    def process_outputs(self, engine_core_outputs: Sequence[Any], *arguments: Any, **named: Any) -> Any:
        """As vLLM's; reports are taken out of the outputs first, so that none gets into an answer. What is told of a
        request that has ended here, as by a stop string, is of tokens that are not in its answer, and is dropped.
        """
        for output in engine_core_outputs:
            found = output.kv_transfer_params
            if found is not None and REPORT_KEY in found:
                output.kv_transfer_params = None
                if output.request_id not in self.request_states:
                    continue
                for report in found[REPORT_KEY]:
                    try:
                        self.trimtab_receive(report_from_bytes(report))
                    except Exception:  # noqa: BLE001 - it must not reach vLLM, which would end every request
                        # An outcome that cannot be read fails its own request, by the time limit.
                        _log.exception("a report of request %s cannot be read", output.request_id)
        return super().process_outputs(engine_core_outputs, *arguments, **named)  # type: ignore[misc]


@dataclass(slots=True, eq=False)
class _Told:
    """What has been told of a plan.

    Attributes:
        outcomes: by sample; one that was preempted may be reported again and still counts once.
        responses: likewise, the latest.
        rejection: why the request was never run.
        arrived: set when something has come; there once somebody waits.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    responses: dict[int, Response] = field(default_factory=dict)
    rejection: TrimtabError | None = None
    arrived: asyncio.Event | None = None


class OutcomeListener:
    """Keeps what is told of the plans that are expected, until they are forgotten. All in one thread."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        """By plan."""

    def receive(self, report: Report) -> None:
        """Keep a report; see `listen`."""
        told = self._told.get(report.plan_id)
        if told is None:
            return
        if isinstance(report, Outcome):
            told.outcomes[sample_of(report.request_id)] = report
        elif isinstance(report, Rejection):
            told.rejection = TrimtabError.from_fields(report.error)
        else:
            told.responses[sample_of(report.request_id)] = report
        if told.arrived is not None:
            told.arrived.set()

    def expect(self, plan_id: str) -> None:
        """Keep what is told of this plan; call before the request is sent. What is told of others is dropped."""
        if plan_id not in self._told:
            self._told[plan_id] = _Told()

    async def wait(self, plan_id: str, samples: Collection[int], timeout: float) -> dict[int, Outcome]:  # noqa: ASYNC109 - a deadline is part of the contract
        """Outcomes of these samples of a plan, once all of them are there: a sample's is when it has a token.

        Raises:
            EditNotConfirmed: one did not come within `timeout` seconds.
            EditFailed: the engine says that an edit was not applied or a gate could not decide. A gate that decided to
                edit nothing is no error.
            TrimtabError: the request was never run; see `rejection`.
        """
        self.expect(plan_id)
        told = self._told[plan_id]
        if not _has(told.outcomes, samples):
            await self._arrival(told, samples, timeout)
        found = {sample: told.outcomes[sample] for sample in samples}
        for outcome in found.values():
            if outcome.error or not (outcome.applied or outcome.decision):
                raise EditFailed(f"the engine did not apply edit {outcome.edit!r}: {outcome.error}")
        return found

    def responses(self, plan_id: str) -> dict[int, Response]:
        """What the response probe has read of a plan's samples, of each up to the latest token that there is."""
        told = self._told.get(plan_id)
        return {} if told is None else dict(told.responses)

    def rejection(self, plan_id: str) -> TrimtabError | None:
        """Why the request of a plan was never run, once vLLM has said that it failed; None where it was run."""
        told = self._told.get(plan_id)
        return None if told is None else told.rejection

    def forget(self, plan_id: str) -> None:
        """Drop what is kept of a plan; call when its request ends, however it ends."""
        self._told.pop(plan_id, None)

    @staticmethod
    async def _arrival(told: _Told, samples: Collection[int], timeout: float) -> None:  # noqa: ASYNC109 - as above
        """Wait until all of these samples have been told of: one may have a token before its sibling has."""
        outcomes = told.outcomes
        try:
            async with asyncio.timeout(timeout):
                while not _has(outcomes, samples):
                    if told.rejection is not None:
                        raise told.rejection
                    if told.arrived is None:
                        told.arrived = asyncio.Event()
                    told.arrived.clear()
                    await told.arrived.wait()
        except TimeoutError:
            there = sum(sample in outcomes for sample in samples)
            raise EditNotConfirmed(
                f"the engine confirmed {there} of {len(samples)} edits within {timeout:.3g} s; the answer is withheld"
            ) from None


def _has(outcomes: Mapping[int, Outcome], samples: Collection[int]) -> bool:
    return all(map(outcomes.__contains__, samples))


def sample_of(request_id: str) -> int:
    """Which sample of its request this is: vLLM's `ParentRequest` puts that before the ids where n > 1."""
    number, _, own = request_id.partition("_")
    return int(number) if own and number.isdecimal() else 0
