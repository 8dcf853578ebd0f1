"""Worker class: vLLM's own for this platform, with the V1 runner steered and a report over RPC.

Named in `worker_cls`, imported in worker processes only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from steering import __version__
from steering.engine.compat import ARCHITECTURES
from steering.engine.finite import BROKEN_REQUESTS, FiniteCheck
from steering.engine.options import options_from
from steering.engine.parent import end_with_parent
from steering.engine.prefix_cache import REPORTS
from steering.engine.roster import RELEASED
from steering.engine.runner_v1 import steer
from steering.errors import PluginNotArmed, TrimtabError, UnsupportedArchitecture

if TYPE_CHECKING:
    from steering.engine.model import Reports, Steering


def _platform_worker() -> type[Any]:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


class SteeringWorker(_platform_worker()):  # type: ignore[misc]
    """vLLM's worker; methods whose names start with `steering_` are called by the gateway through `collective_rpc`."""

    def init_device(self) -> None:
        """Make the device and the runner; a V1 runner is steered here, a V2 runner through its model state."""
        end_with_parent()
        super().init_device()
        if not self.use_v2_model_runner:
            steer(self.model_runner)

    def load_model(self, *arguments: Any, **named: Any) -> None:
        """Load the model.

        Raises:
            UnsupportedArchitecture: bundles are to be served, but vLLM chose a class the plugin did not make.
        """
        super().load_model(*arguments, **named)
        options = options_from(self.vllm_config)
        if options is not None and getattr(self.model_runner.get_model(), "steering", None) is None:
            raise UnsupportedArchitecture(
                f"architecture {self.model_config.architecture!r} cannot be steered; supported: {sorted(ARCHITECTURES)}"
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's; requests that ended are forgotten first. The V2 runner removes preempted ones in the same way as
        these, but what a gate decided for a preempted request must be there when it comes back. The V1 runner forgets
        them itself; after that, bundles are released that the scheduler knows no request of any more.
        """
        steering = self._steering()
        if steering is None:
            return super().execute_model(scheduler_output)
        if self.use_v2_model_runner and steering.live:
            for request_id in scheduler_output.finished_req_ids:
                steering.end(request_id)
        result = super().execute_model(scheduler_output)
        released = getattr(scheduler_output, RELEASED, ())
        if released or steering.loads.is_waiting:
            steering.loads.release(released)
        return result

    def sample_tokens(self, *arguments: Any) -> Any:
        """As vLLM's; with the output go the reports of its step and, where the finite check is on, the names of
        requests that are to be ended. VLLM takes the output of the first rank, which is the one that tells.
        """
        output = super().sample_tokens(*arguments)
        steering = self._steering()
        if steering is None:
            return output
        reports = steering.take_reports()
        if reports is None and steering.finite is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _Told(output, reports, steering.finite)
        return _with(output, reports, steering.finite)

    def steering_load(self, path: str, digest: str) -> dict[str, Any]:
        """Put a bundle into the bank of every rank, or of none; to be called on all of them at once.

        No request can name it before the scheduler is told to open it.

        Returns:
            error: fields of the error that kept this rank from it, None for none.
        """
        return _told(lambda: self._armed().loads.load(Path(path), digest))

    def steering_unload(self, digest: str) -> dict[str, Any]:
        """Take a bundle out of the bank that no request can name; refused while one does.

        Whoever unloads a bundle that is open tells the scheduler to close it: a step then releases it on every rank
        when its last request has ended.

        Returns:
            error: as of `steering_load`.
        """
        return _told(lambda: self._armed().loads.unload(digest))

    def steering_report(self) -> dict[str, Any]:
        """What this worker can do and has done.

        Returns:
            version: of the plugin; architecture; runner: "v1" or "v2"; hidden_size; layers: that carry the op;
            bundles: edit names by digest; gates: profiles with a gate by digest; responses: tokens that the
            response probe reads by digest; taken: rows of each layer's table that these take; terms: rows that each
            table has; rows: capacity; live: steered requests now; witness: layers whose op has edited a token since
            the last `steering_clear_witness`; captured: layers that are captured. Layers, bundles and gates are empty
            when nothing is armed.
        """
        steering = self._steering()
        report: dict[str, Any] = {
            "version": __version__,
            "architecture": self.model_config.architecture,
            "runner": "v2" if self.use_v2_model_runner else "v1",
            "hidden_size": self.model_config.get_hidden_size(),
            "layers": [],
            "bundles": {},
            "gates": {},
            "responses": {},
            "taken": {},
            "terms": 0,
            "rows": 0,
            "live": 0,
            "witness": [],
            "captured": [],
        }
        if steering is not None:
            report |= {
                "layers": list(steering.layers),
                "bundles": steering.bank.bundles,
                "gates": steering.bank.gates,
                "responses": steering.bank.responses,
                "taken": steering.bank.taken,
                "terms": steering.bank.terms,
                "rows": steering.rows.capacity,
                "live": steering.rows.live,
                "witness": steering.bank.witness(),
                "captured": [] if steering.capture is None else list(steering.capture.layers),
            }
        return report

    def steering_flush_capture(self) -> int:
        """Write what has been captured into files; how many indexes they hold then, 0 on ranks that write nothing.

        Raises:
            CaptureError: something could not be written.
        """
        steering = self._steering()
        return 0 if steering is None or steering.capture is None else int(steering.capture.flush())

    def shutdown(self) -> None:
        """As vLLM's; what has been captured is written first."""
        runner = getattr(self, "model_runner", None)
        if runner is not None and getattr(runner, "model", None) is not None:
            self.steering_flush_capture()
            steering = self._steering()
            if steering is not None:
                steering.close()
        super().shutdown()

    def steering_clear_witness(self) -> None:
        """Forget which layers' ops have run, to see which run next."""
        steering = self._steering()
        if steering is not None:
            steering.bank.clear_witness()

    def _steering(self) -> Steering | None:
        found: Steering | None = getattr(self.model_runner.get_model(), "steering", None)
        return found

    def _armed(self) -> Steering:
        steering = self._steering()
        if steering is None:
            raise PluginNotArmed("this engine was started without bundles and layers, so that none can be loaded")
        return steering


class _Told(AsyncModelRunnerOutput):
    """An output of vLLM's that is on its way from the device."""

    def __init__(
        self, output: AsyncModelRunnerOutput, reports: Reports | Future[Reports] | None, check: FiniteCheck | None
    ) -> None:
        self._output, self._reports, self._check = output, reports, check

    def get_output(self) -> Any:
        """As vLLM's, with what its step made known."""
        return _with(self._output.get_output(), self._reports, self._check)


def _with(output: Any, reports: Reports | Future[Reports] | None, check: FiniteCheck | None) -> Any:
    """An output with what its step made known; on a device waits for that, which is there before any token is."""
    if isinstance(reports, Future):
        reports = reports.result()
    broken = () if check is None else check.take()  # of this step, if it has just been waited for
    if output is not None and (broken or reports):
        if output is EMPTY_MODEL_RUNNER_OUTPUT:  # one for all
            output = copy.copy(output)
        setattr(output, BROKEN_REQUESTS, broken)
        setattr(output, REPORTS, reports)
    return output


def _told(work: Callable[[], None]) -> dict[str, Any]:
    """Do some work; errors become fields, as vLLM carries only the text of those raised in a worker."""
    try:
        work()
    except TrimtabError as error:
        return {"error": error.to_fields()}
    return {"error": None}
