"""Offline engine: vLLM with the plugin in this process, for fits: capture, sampling, given answers, steering.

Everything that is asked at once runs in one batch, whatever the edits and strengths. Nothing is ever silently
unsteered: an ask whose edit the engine does not confirm raises.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from steering.bundle import Bundle, load_bundle
from steering.engine.asks import Answer, Ask, BundleGate, EditOrder, Sample
from steering.engine.capture import CAPTURE_KEY
from steering.engine.capture_notes import CaptureNotes
from steering.engine.options import CAPTURE_FOLDER_VARIABLE, CaptureSettings, engine_arguments
from steering.engine.outcomes import OutcomeInbox, sample_of
from steering.errors import CaptureError, EditNotApplied, EngineError, InvalidSpec, UnsupportedConfiguration
from steering.fingerprint import fingerprint_of
from steering.fit.captured import CapturedShards
from steering.plan import PLAN_KEY, Outcome, Plan, Response

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["Answer", "Ask", "BundleGate", "CaptureSettings", "EditOrder", "OfflineEngine", "Sample"]

OUTCOME_PATIENCE = 10.0
"""Seconds after the last answer for what the engine did to arrive; it comes before the first token as a rule."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""What vLLM reads when imported; what the operator set stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """An ask on its way: its plan, if anything is to be done, and the index its residuals are kept under."""

    ask: Ask
    plan: Plan | None
    index: int | None


class _Reports(NamedTuple):
    """What the engine said it did, and what its response probe read, by plan and by its id of the sample."""

    outcomes: dict[str, dict[str, Outcome]]
    responses: dict[str, dict[str, Response]]


class OfflineEngine:
    """A model served to this process alone; used as a context manager, one at a time in a process.

    Args:
        model: local folder.
        bundles: folders of the bundles whose edits and gates may be asked for.
        capture: what is kept of asks that capture; None where none does.
        options: vLLM's own, by argument name.
        accept_transfer: bundles made for a model of the same shape are accepted.

    Attributes:
        bundles: as loaded.
    """

    bundles: tuple[Bundle, ...]

    def __init__(
        self,
        model: Path,
        *,
        bundles: Sequence[Path] = (),
        capture: CaptureSettings | None = None,
        options: Mapping[str, Any] | None = None,
        accept_transfer: bool = False,
    ) -> None:
        self._model, self._paths, self._capture = model, tuple(bundles), capture
        self._options, self._accept_transfer = dict(options or {}), accept_transfer
        self._notes: CaptureNotes | None = None

    def __enter__(self) -> Self:
        """Start the engine.

        Raises:
            OperatorError: model, bundles, capture folder and options do not go together.
        """
        fingerprint = fingerprint_of(self._model)
        self.bundles = tuple(load_bundle(path) for path in self._paths)
        for bundle in self.bundles:
            bundle.manifest.model.check(fingerprint, bundle=bundle.manifest.name, accept_transfer=self._accept_transfer)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with ExitStack() as stack:
            self._inbox = stack.enter_context(OutcomeInbox())
            changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if self._capture is not None:
                changed[CAPTURE_FOLDER_VARIABLE] = str(self._capture.folder.resolve())
            stack.enter_context(_environment(changed))
            self._engine = self._started()
            stack.callback(self._stop)
            if self._capture is not None:
                identity = {"model": fingerprint.model_dump(), "dtype": str(self._engine.model_config.dtype)}
                self._notes = CaptureNotes(self._capture.folder, identity=identity, generated=self._capture.generated)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the engine; what was captured is in files then."""
        self._stack.close()

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self._engine.get_tokenizer()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a talk up to and including the assistant's header."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer.encode(str(text), add_special_tokens=False))

    def ask(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = lambda _done: None) -> list[Answer]:
        """Ask everything together and wait for all of it.

        Args:
            asks: each with its own edit, strength and number of samples. The residuals of those that capture get the
                next indexes, in this order; residuals that are in the folder already are not kept again.
            on_progress: is told how many asks have been answered.

        Raises:
            InvalidSpec: an ask is too long for the model, or names what is not loaded.
            EditNotApplied: the engine did not confirm an edit, or a gate could not decide.
            CaptureError: residuals could not be written, or the folder holds those of other asks.
        """
        questions = self._questions(asks)
        try:
            return self._answers(questions, on_progress)
        finally:
            if any(question.index is not None for question in questions):
                self._flush()

    def capture(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = lambda _done: None) -> CapturedShards:
        """Ask for residuals alone: no ask is repeated whose residuals are in the folder, and no answer comes back.

        Where no generated tokens are kept, one token is generated and thrown away.

        Returns:
            Everything in the folder; rows in the order of all asks that captured since the engine started.
        """
        if self._capture is None:
            raise CaptureError("residuals are asked for, and the engine was started without capture")
        if not self._capture.generated:
            asks = [replace(ask, samples=1, temperature=0.0, max_tokens=1, answer=None) for ask in asks]
        questions = self._questions([replace(ask, capture=True) for ask in asks])
        missing = [question for question in questions if question.index is not None]
        done = len(asks) - len(missing)
        try:
            self._answers(missing, lambda answered: on_progress(done + answered))
        finally:
            self._flush()
        return self.captured()

    def captured(self) -> CapturedShards:
        """What has been captured into the folder so far.

        Raises:
            CaptureError: nothing was, or an earlier run was interrupted and its asks have not been repeated yet.
        """
        if self._capture is None or self._notes is None:
            raise CaptureError("the engine was started without capture")
        return CapturedShards(self._capture.folder, count=self._notes.count)

    def report(self) -> dict[str, Any]:
        """What the worker's first rank says of itself; see `SteeringWorker.steering_report`. Empty without plugin."""
        if not (self._paths or self._capture):
            return {}
        found: dict[str, Any] = self._engine.collective_rpc("steering_report")[0]
        return found

    def _started(self) -> LLMEngine:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        own = engine_arguments(self._paths, capture=self._capture) if self._paths or self._capture else {}
        taken = sorted(set(own) & set(self._options))
        if taken:
            raise UnsupportedConfiguration(f"vLLM's options {taken} are set by the plugin")
        defaults = {"seed": 0, "disable_log_stats": True, "enforce_eager": current_platform.is_cpu()}
        arguments = EngineArgs(**{**defaults, **self._options, **own, "model": str(self._model)})
        return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)

    def _stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()

    def _plan(self, ask: Ask) -> Plan | None:
        """What the engine is to do for an ask."""
        given: dict[str, Any] = {} if ask.answer is None else {"prompt_length": len(ask.prompt)}
        if ask.gate is not None:
            order: EditOrder | BundleGate = ask.gate
            what: dict[str, Any] = {"gate": ask.gate.order}
        elif ask.edit is not None and ask.edit.strength != 0:
            order, what = ask.edit, {"edit": ask.edit.edit, "scope": ask.edit.scope}
        else:
            observing = [bundle for bundle in self.bundles if bundle.manifest.response is not None]
            if not observing:
                return None
            digest = observing[0].digest
            return Plan(id=secrets.token_hex(16), bundle=digest, strength=1.0, response=True, **given)
        loaded = {bundle.digest: bundle for bundle in self.bundles}
        if order.bundle not in loaded:
            raise InvalidSpec(f"no bundle {order.bundle} is loaded; loaded: {sorted(loaded)}")
        response = loaded[order.bundle].manifest.response is not None
        return Plan(
            id=secrets.token_hex(16),
            bundle=order.bundle,
            strength=order.strength,
            response=response,
            **what,
            **given,
        )

    def _parameters(self, question: _Question) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ask = question.ask
        extra: dict[str, Any] = {}
        if question.plan is not None:
            extra[PLAN_KEY] = question.plan.to_json()
        if question.index is not None:
            end = [] if ask.answer is None else [len(ask.prompt)]
            extra[CAPTURE_KEY] = [question.index, *end]
        if ask.answer is not None:
            return SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=extra or None,
            )
        return SamplingParams(
            n=ask.samples,
            temperature=ask.temperature,
            seed=ask.seed,
            max_tokens=ask.max_tokens,
            logprobs=0,
            detokenize=not self._engine.model_config.skip_tokenizer_init,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra or None,
        )

    def _answers(self, questions: Sequence[_Question], on_progress: Callable[[int], None]) -> list[Answer]:
        most = self._engine.model_config.max_model_len
        for number, question in enumerate(questions):
            needed = len(question.ask.tokens) + 1
            if needed > most:
                raise InvalidSpec(f"ask {number} has {needed - 1} tokens, the engine's context is {most}")
        outputs: dict[int, RequestOutput] = {}
        reports = _Reports(outcomes=defaultdict(dict), responses=defaultdict(dict))
        mine = secrets.token_hex(4)
        names = {f"ask-{mine}-{number}": number for number in range(len(questions))}
        try:
            for name, question in zip(names, questions, strict=True):
                self._engine.add_request(
                    name, {"prompt_token_ids": list(question.ask.tokens)}, self._parameters(question)
                )
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        outputs[names[output.request_id]] = output  # type: ignore[assignment]
                        on_progress(len(outputs))
                self._inbox.drain_into(*reports)
        except BaseException:
            self._engine.abort_request([name for name, number in names.items() if number not in outputs])
            raise
        self._await(questions, reports, outputs)
        return [_answer(number, question, outputs[number], reports) for number, question in enumerate(questions)]

    def _await(self, questions: Sequence[_Question], reports: _Reports, outputs: Mapping[int, RequestOutput]) -> None:
        """Wait for what the engine did to each sample of each question that is steered, and for what it observed."""
        end = time.monotonic() + OUTCOME_PATIENCE
        steered = {
            question.plan.id: question.ask.samples
            for question in questions
            if question.plan and question.plan.is_steering
        }
        observed = {
            question.plan.id: [_fed(question.ask, sample) for sample in outputs[number].outputs]
            for number, question in enumerate(questions)
            if question.plan is not None and question.plan.response
        }
        while True:
            self._inbox.drain_into(*reports)
            lacking = [plan for plan, samples in steered.items() if len(reports.outcomes[plan]) < samples]
            unread = [plan for plan, fed in observed.items() if len(reports.responses[plan]) < sum(map(bool, fed))]
            if not (lacking or unread) or (not lacking and time.monotonic() > end):
                return
            if time.monotonic() > end:
                raise EditNotApplied(f"the engine did not confirm the edits of {len(lacking)} of {len(steered)} asks")
            time.sleep(0.01)

    def _questions(self, asks: Sequence[Ask]) -> list[_Question]:
        indexes: Sequence[int | None] = [None] * len(asks)
        if any(ask.capture for ask in asks):
            if self._notes is None:
                raise CaptureError("an ask captures, and the engine was started without capture")
            indexes = self._notes.indexes(asks)
        return [_Question(ask=ask, plan=self._plan(ask), index=index) for ask, index in zip(asks, indexes, strict=True)]

    def _flush(self) -> None:
        assert self._notes is not None
        try:
            self._engine.collective_rpc("steering_flush_capture")
        except CaptureError:
            raise
        except Exception as error:
            raise EngineError(f"the engine does not say whether it has written what it captured: {error}") from error
        self._notes.refresh()


def _fed(ask: Ask, sample: Any) -> int:
    """How many tokens of an answer were fed back, so that a probe could read them."""
    return len(ask.answer) if ask.answer is not None else len(sample.token_ids) - 1


def _answer(number: int, question: _Question, output: RequestOutput, reports: _Reports) -> Answer:
    ask, plan = question.ask, question.plan
    if any(sample.finish_reason in ("error", "abort") for sample in output.outputs):
        raise EngineError(f"the engine rejected ask {number}; its log says why")
    reported: tuple[Outcome, ...] = ()
    response = None
    if plan is not None and plan.response:
        read = {sample_of(name): each.probability for name, each in reports.responses[plan.id].items()}
        response = tuple(read.get(sample) for sample in range(ask.samples))
    if plan is not None and plan.is_steering:
        by_sample = {sample_of(request_id): outcome for request_id, outcome in reports.outcomes[plan.id].items()}
        reported = tuple(by_sample[sample] for sample in range(ask.samples))
        for outcome in reported:
            if outcome.error or not (outcome.applied or outcome.decision):
                raise EditNotApplied(f"ask {number}: the engine did not apply edit {plan.edit!r}: {outcome.error}")
    if ask.answer is not None:
        assert output.prompt_logprobs is not None
        places = output.prompt_logprobs[len(ask.prompt) : len(ask.tokens)]
        given = [place[token].logprob for place, token in zip(places, ask.answer, strict=True) if place is not None]
        assert len(given) == len(ask.answer)
        return Answer(given=tuple(given), outcomes=reported, response=response)
    samples = []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        assert sample.logprobs is not None
        pairs = zip(sample.logprobs, sample.token_ids, strict=True)
        logprobs = [place[token].logprob for place, token in pairs if place is not None]
        samples.append(
            Sample(
                tokens=tuple(sample.token_ids),
                logprobs=tuple(logprobs),
                text=sample.text,
                finish=str(sample.finish_reason),
            )
        )
    return Answer(samples=tuple(samples), outcomes=reported, response=response)


class _environment:  # noqa: N801 - used as a function is
    """Variables set for as long as the engine lives."""

    def __init__(self, changed: Mapping[str, str]) -> None:
        self._changed = changed
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        for name, value in self._changed.items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value

    def __exit__(self, *_error: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
