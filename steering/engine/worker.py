"""Worker class: vLLM's own for this platform, with the V1 runner steered and a report over RPC.

Named in `worker_cls`, imported in worker processes only.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from steering import __version__
from steering.engine.compat import ARCHITECTURES
from steering.engine.options import options_from
from steering.engine.runner_v1 import steer
from steering.errors import UnsupportedArchitecture


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
        these, but what a gate decided for a preempted request must be there when it comes back.
        """
        steering = getattr(self.model_runner.get_model(), "steering", None) if self.use_v2_model_runner else None
        if steering is not None and steering.live:
            for request_id in scheduler_output.finished_req_ids:
                steering.end(request_id)
        return super().execute_model(scheduler_output)

    def steering_report(self) -> dict[str, Any]:
        """What this worker can do and has done.

        Returns:
            version: of the plugin; architecture; runner: "v1" or "v2"; hidden_size; layers: that carry the op;
            bundles: edit names by digest; gates: profiles with a gate by digest; responses: tokens that the
            response probe reads by digest; rows: capacity; live: steered requests
            now; witness: layers whose op has edited a token since the last `steering_clear_witness`; captured: layers
            that are captured. Layers, bundles and gates are empty when nothing is armed.
        """
        model = self.model_runner.get_model()
        steering = getattr(model, "steering", None)
        report: dict[str, Any] = {
            "version": __version__,
            "architecture": self.model_config.architecture,
            "runner": "v2" if self.use_v2_model_runner else "v1",
            "hidden_size": self.model_config.get_hidden_size(),
            "layers": [],
            "bundles": {},
            "gates": {},
            "responses": {},
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
        steering = getattr(self.model_runner.get_model(), "steering", None)
        return 0 if steering is None or steering.capture is None else int(steering.capture.flush())

    def shutdown(self) -> None:
        """As vLLM's; what has been captured is written first."""
        runner = getattr(self, "model_runner", None)
        if runner is not None and getattr(runner, "model", None) is not None:
            self.steering_flush_capture()
            steering = getattr(runner.get_model(), "steering", None)
            if steering is not None:
                steering.close()
        super().shutdown()

    def steering_clear_witness(self) -> None:
        """Forget which layers' ops have run, to see which run next."""
        steering = getattr(self.model_runner.get_model(), "steering", None)
        if steering is not None:
            steering.bank.clear_witness()
