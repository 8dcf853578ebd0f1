"""Offline engine: vLLM with the plugin in this process, for fits: capture, sampling, given answers, steering.

Everything that is asked at once runs in one batch, whatever the edits and strengths. Nothing is ever silently
unsteered: an ask whose edit the engine does not confirm raises.
"""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from steering.bundle import Bundle, load_bundle
from steering.engine.asks import Answer, Ask, BundleGate, EditOrder, Sample
from steering.engine.capture_notes import CaptureNotes
from steering.engine.compat import set_environment, startable
from steering.engine.options import CAPTURE_FOLDER_VARIABLE, CaptureSettings, engine_arguments
from steering.engine.outcomes import listen
from steering.engine.questions import Question, Reports, answer_of, confirmed, parameters_of, plan_of_ask
from steering.errors import CaptureError, EngineError, InvalidSpec, UnsupportedConfiguration
from steering.fingerprint import fingerprint_of
from steering.fit.captured import CapturedShards
from steering.outcome import Report

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["Answer", "Ask", "BundleGate", "CaptureSettings", "EditOrder", "OfflineEngine", "Sample"]


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
        set_environment()
        with ExitStack() as stack:
            changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if self._capture is not None:
                changed[CAPTURE_FOLDER_VARIABLE] = str(self._capture.folder.resolve())
            stack.enter_context(_environment(changed))
            self._engine = self._started()
            stack.callback(self._stop)
            self._reports = Reports()
            listen(self._engine, self._receive)
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

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return int(self._engine.model_config.max_model_len)

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
            EngineError: the engine rejected an ask.
            EditNotApplied: the engine did not confirm an edit, or a gate could not decide.
            CaptureError: residuals could not be written, or the folder holds those of other asks.
        """
        questions = self._questions(asks)
        try:
            outputs, reports = self._run(questions, on_progress)
            return [
                answer_of(question, outputs[number], reports, confirmed(number, question, reports))
                for number, question in enumerate(questions)
            ]
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
        missing = [replace(question, is_silent=True) for question in questions if question.index is not None]
        done = len(asks) - len(missing)
        try:
            _, reports = self._run(missing, lambda answered: on_progress(done + answered))
            for number, question in enumerate(missing):
                confirmed(number, question, reports)
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

        own: dict[str, Any] = {}
        if self._paths or self._capture:
            own = engine_arguments(self._paths, capture=self._capture, is_reporting=True)
        taken = sorted(set(own) & set(self._options))
        if taken:
            raise UnsupportedConfiguration(f"vLLM's options {taken} are set by the plugin")
        defaults = {"seed": 0, "disable_log_stats": True, "enforce_eager": current_platform.is_cpu()}
        arguments = EngineArgs(**{**defaults, **self._options, **own, "model": str(self._model)})
        with startable():
            return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)

    def _stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()

    def _run(
        self, questions: Sequence[Question], on_progress: Callable[[int], None]
    ) -> tuple[dict[int, RequestOutput], Reports]:
        """Have the engine answer everything together; what it said of it by then."""
        has_text = not self._engine.model_config.skip_tokenizer_init
        most = self.context
        for number, question in enumerate(questions):
            needed = len(question.ask.tokens) + 1
            if needed > most:
                raise InvalidSpec(f"ask {number} has {needed - 1} tokens, the engine's context is {most}")
        outputs: dict[int, RequestOutput] = {}
        reports = self._reports = Reports()
        mine = secrets.token_hex(4)
        names = {f"ask-{mine}-{number}": number for number in range(len(questions))}
        try:
            for name, question in zip(names, questions, strict=True):
                self._engine.add_request(
                    name, {"prompt_token_ids": list(question.ask.tokens)}, parameters_of(question, detokenize=has_text)
                )
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        outputs[names[output.request_id]] = output  # type: ignore[assignment]
                        on_progress(len(outputs))
        except BaseException:
            self._engine.abort_request([name for name, number in names.items() if number not in outputs])
            raise
        for number, output in outputs.items():
            if any(sample.finish_reason in ("error", "abort") for sample in output.outputs):
                plan = questions[number].plan
                reason = None if plan is None else reports.rejections.get(plan.id)
                raise EngineError(f"the engine rejected ask {number}: {reason or 'its log says why'}")
        return outputs, reports

    def _receive(self, report: Report) -> None:
        self._reports.receive(report)  # of the asks that are answered now

    def _questions(self, asks: Sequence[Ask]) -> list[Question]:
        indexes: Sequence[int | None] = [None] * len(asks)
        if any(ask.capture for ask in asks):
            if self._notes is None:
                raise CaptureError("an ask captures, and the engine was started without capture")
            indexes = self._notes.indexes(asks)
        return [
            Question(ask=ask, plan=plan_of_ask(ask, self.bundles), index=index)
            for ask, index in zip(asks, indexes, strict=True)
        ]

    def _flush(self) -> None:
        assert self._notes is not None
        try:
            self._engine.collective_rpc("steering_flush_capture")
        except CaptureError:
            raise
        except Exception as error:
            raise EngineError(f"the engine does not say whether it has written what it captured: {error}") from error
        self._notes.refresh()


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
