"""Steered model classes: vLLM's own, with an op after each decoder block that is edited, read by a gate or captured.

`Steered<Architecture>` is made on first use, by a factory, from vLLM's class of that name: weight names do not change,
torch.compile traces through it, there are no forward hooks and nothing is patched.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering.engine.bank import Bank
from steering.engine.capture import Capture, capture_of
from steering.engine.compat import ARCHITECTURES, check_configuration, class_location
from steering.engine.finite import FiniteCheck, mark
from steering.engine.kernels import ROW
from steering.engine.loads import Loads
from steering.engine.options import SteeringOptions, enter_compile_key, options_from
from steering.engine.prefix_cache import plan_of
from steering.engine.prepared import PreparedEdit, prepare
from steering.engine.rows import NOTHING, Rows
from steering.engine.steered import Due, Steered
from steering.engine.uploads import RowDownload
from steering.errors import UnsupportedConfiguration
from steering.outcome import report_to_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig

_log = logging.getLogger("trimtab")

PREFIX = "Steered"

_Row = tuple[Steered, int]
Reports = dict[str, list[bytes]]
"""By request, as `report_to_bytes` makes them."""


class Steering:
    """All state of the plugin in one worker: bank, rows, reports on their way out, and what is captured.

    Args:
        options: bundles, capacity, and what to capture.
        width: residual width, D.
        config: vLLM's configuration; gives the most requests and tokens of a step.
        device: where the model lives.
    """

    def __init__(self, *, options: SteeringOptions, width: int, config: VllmConfig, device: torch.device) -> None:
        self.layers = options.layers
        self.bank = Bank(
            layers=self.layers,
            width=width,
            terms=options.terms_per_layer,
            device=device,
            dtype=cast("torch.dtype", config.model_config.dtype),
        )
        for bundle in options.bundles:
            self.bank.load(bundle)
        self.rows = Rows(
            bank=self.bank,
            requests=config.scheduler_config.max_num_seqs,
            tokens=config.scheduler_config.max_num_batched_tokens,
            device=device,
        )
        self.capture = None if options.capture is None else _capture(options, width, config, device)
        self.is_sparing = self.bank.is_sparing
        """Whether the op that spares reasoning is part of the model, and of the graphs made of it."""
        self._download = RowDownload(self.rows.rows)
        self.finite = FiniteCheck(self.rows, self._download) if options.is_checking_finite else None
        self.loads = Loads(
            bank=self.bank,
            rows=self.rows,
            vote=_do_all_ranks,
            settle=self._download.settle,
            can_spare=self.is_sparing,
        )
        self._is_reporting = options.is_reporting and _is_first_rank()
        """Every rank edits and decides alike, on the same residuals; one of them tells."""
        self._due = NOTHING
        self._reports: Reports | Future[Reports] | None = None

    @property
    def live(self) -> int:
        """Requests that something is known of."""
        return self.rows.live + (self.capture.live if self.capture is not None else 0)

    def start(self, request: Any, prompt_length: int) -> None:
        """A request starts, or comes back as a new one after a preemption.

        Args:
            request: vLLM's `NewRequestData`.
            prompt_length: number of its tokens, without those generated before a preemption.
        """
        found = plan_of(request)
        if found is not None:
            plan_id, plan = found
            # The V2 runner adds a preempted request as a new one: these are its prompt and what it has generated.
            tokens = request.prefill_token_ids or request.prompt_token_ids or ()
            end, computed = plan.end_of_prompt(prompt_length), request.num_computed_tokens
            self.rows.add(request.req_id, plan, end, tokens, computed, plan_id=plan_id)
        order = None if self.capture is None else capture_of(request)
        if self.capture is not None and order is not None:
            self.capture.add(request.req_id, order, prompt_length)

    def end(self, request_id: str) -> None:
        """A request finished."""
        self.rows.remove(request_id)
        if self.capture is not None:
            self.capture.remove(request_id)

    def close(self) -> None:
        """The engine ends."""
        self._download.settle()

    def before_forward(
        self, request_ids: Sequence[str], tokens: NDArray[np.int32], computed: NDArray[np.int32]
    ) -> None:
        """Write the maps of the next step, and hold the requests whose outcomes its pass makes true.

        Arguments are those of `Rows.write_step`.
        """
        due = self.rows.write_step(request_ids, tokens, computed)
        if due is not NOTHING:
            left = self._due  # of a pass that was prepared and failed
            self._due = due if left is NOTHING else Due(*(one + other for one, other in zip(left, due, strict=True)))
        if self.capture is not None:
            self.capture.write_step(request_ids, tokens, computed)

    def after_forward(self) -> None:
        """Read what became true; called once the forward pass has been launched without an error."""
        if self.capture is not None:
            self.capture.after_forward()
        if self.finite is not None:
            self.finite.after_forward()
        if self._due is NOTHING:
            return
        due, self._due = self._due, NOTHING
        # By number: a request may have given its row back by the time the table has been read.
        outcomes = [(steered, steered.row) for steered in due.outcomes]
        responses = [(steered, steered.row) for steered in due.responses] if due.responses else []
        if self._download.table is not None:
            self._reports = self._read(self._download.table, outcomes, responses)
            return
        reading = self._download.then(lambda table: self._read(table.data.cast("B"), outcomes, responses))
        self._reports = reading
        for steered, _ in outcomes:
            if steered.order.gate is not None:
                steered.reading = reading

    def take_reports(self) -> Reports | Future[Reports] | None:
        """What the step whose forward pass was the last one made known, to go with its output; None for nothing. On a
        device it is read once that has done the step.
        """
        reports, self._reports = self._reports, None
        return reports

    def _read(self, table: memoryview, outcomes: Sequence[_Row], responses: Sequence[_Row]) -> Reports:
        """What the table of rows [S, W] float32, as bytes, says of requests, each with its row's number.

        A request whose row cannot be read is not told of, so that it fails and no neighbour does.
        """
        reports: Reports = {}
        for read, due in ((self.rows.outcome, outcomes), (self.rows.response, responses)):
            for steered, row in due:
                try:
                    report = read(steered, table, row * ROW.size)
                    if report is not None and self._is_reporting:
                        reports.setdefault(steered.request_id, []).append(report_to_bytes(report))
                except Exception:  # noqa: BLE001 - any error would else end the engine, for every request
                    _log.exception("what was done to request %s cannot be read", steered.request_id)
        return reports


class SteeredLayer(nn.Module):
    """Mixed into a decoder block's class: runs the block, then edits the residual stream at its output.

    vLLM's blocks return the pair (hidden, residual) whose sum is the stream; the op reads the sum and writes `hidden`.
    """

    steering_token_rows: Tensor
    steering_rows: Tensor
    steering_table: Tensor
    steering_prepared: PreparedEdit | None = None

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Arguments and result are those of the block."""
        hidden, residual = super().forward(*arguments, **named)
        if self.steering_prepared is None:
            torch.ops.trimtab.edit(hidden, residual, self.steering_token_rows, self.steering_rows, self.steering_table)
        else:
            self.steering_prepared(hidden, residual)
        return hidden, residual


class CapturingLayer(nn.Module):
    """Mixed into a decoder block's class: runs the block, then copies wanted residuals at its output, not edited."""

    capture_slots: Tensor
    capture_kept: Tensor

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Arguments and result are those of the block."""
        hidden, residual = super().forward(*arguments, **named)
        torch.ops.trimtab.capture(hidden, residual, self.capture_slots, self.capture_kept)
        return hidden, residual


class SteeredModel(nn.Module):
    """Mixed into a vLLM model class. Without bundles or capture the model is vLLM's own in every respect."""

    steering: Steering | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = options_from(vllm_config)
        if options is not None:
            check_configuration(vllm_config, options)
            enter_compile_key(vllm_config, options)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.steering = None
        if options is not None:
            self._arm(vllm_config, options)

    def _arm(self, config: VllmConfig, options: SteeringOptions) -> None:
        width = config.model_config.get_hidden_size()
        blocks = cast("nn.ModuleList", self.get_submodule(ARCHITECTURES[type(self).__name__.removeprefix(PREFIX)]))
        captured = (options.capture.layers or ()) if options.capture is not None else ()
        outside = [layer for layer in (*options.layers, *captured) if layer >= len(blocks)]
        if outside:
            raise UnsupportedConfiguration(
                f"layers {outside} are to be edited or captured, the model has {len(blocks)}"
            )
        steering = Steering(options=options, width=width, config=config, device=next(self.parameters()).device)
        if steering.capture is not None:
            for layer in steering.capture.layers:
                # Before the steering op is put on top, so that what is captured has not been edited.
                blocks[layer].__class__ = _mixed(CapturingLayer, type(blocks[layer]))
                blocks[layer].register_buffer("capture_slots", steering.capture.slots, persistent=False)
                blocks[layer].register_buffer("capture_kept", steering.capture.kept(layer), persistent=False)
        for layer in options.layers:
            block = blocks[layer]
            block.__class__ = _mixed(SteeredLayer, type(block))
            # Buffers, so that the compiler takes them as inputs at fixed addresses and not as constants.
            block.register_buffer("steering_token_rows", steering.rows.token_rows, persistent=False)
            block.register_buffer("steering_rows", steering.rows.rows, persistent=False)
            block.register_buffer("steering_table", steering.bank.tables[layer], persistent=False)
            prepared = prepare(steering.rows.token_rows, steering.rows.rows, steering.bank.tables[layer])
            if config.model_config.enforce_eager:
                cast("SteeredLayer", block).steering_prepared = prepared
        self.steering = steering

    def forward(self, input_ids: Tensor | None, positions: Tensor, *arguments: Any, **named: Any) -> Tensor | Any:
        """As vLLM's; where a bundle spares reasoning the step's tokens are looked at first, and where what is finite is
        checked its result afterwards, both outside the compiled part.

        Raises:
            UnsupportedConfiguration: reasoning is to be spared, and the runner gives embeddings and no tokens.
        """
        if self.steering is not None and self.steering.is_sparing:
            if input_ids is None:
                raise UnsupportedConfiguration("reasoning is spared by the tokens, and only embeddings were given")
            torch.ops.trimtab.spare(input_ids, self.steering.rows.token_rows, self.steering.rows.rows)
        result = super().forward(input_ids, positions, *arguments, **named)
        if self.steering is not None and self.steering.finite is not None:
            hidden = result if isinstance(result, Tensor) else result[0]
            mark(hidden, self.steering.rows.token_rows, self.steering.rows.rows)
        return result

    def compute_logits(self, *arguments: Any, **named: Any) -> Any:
        """As vLLM's; both runners call it right after every forward pass, outside the graph."""
        logits = super().compute_logits(*arguments, **named)  # type: ignore[misc]
        if self.steering is not None:
            self.steering.after_forward()
        return logits

    def get_model_state_cls(self) -> type[Any]:
        """State class for the V2 runner (vLLM 0.32 `model_states.resolve_model_state_cls`)."""
        from steering.engine.runner_v2 import state_class

        return state_class(self)


def _is_first_rank() -> bool:
    """Whether this is the first of the workers that hold the model's shards; with a tensor-parallel size of 1 it is."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def _do_all_ranks(is_done: bool) -> bool:
    """Whether every rank that holds a shard of this model says so; each of them has to ask."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    votes = torch.tensor([int(is_done)])
    if group.world_size > 1:
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(votes.item())


def _capture(options: SteeringOptions, width: int, config: VllmConfig, device: torch.device) -> Capture:
    assert options.capture is not None
    every = range(config.model_config.get_total_num_hidden_layers())
    return Capture(
        options.capture,
        layers=options.capture.layers if options.capture.layers is not None else tuple(every),
        width=width,
        requests=config.scheduler_config.max_num_seqs,
        tokens=config.scheduler_config.max_num_batched_tokens,
        device=device,
        is_writing=_is_first_rank(),
    )


def _mixed(mixin: type[nn.Module], block_class: type[nn.Module]) -> type[nn.Module]:
    if issubclass(block_class, mixin):
        return block_class
    prefix = mixin.__name__.removesuffix("Layer")
    return type(f"{prefix}{block_class.__name__}", (mixin, block_class), {})


def __getattr__(name: str) -> type[nn.Module]:
    """Make `Steered<Architecture>` when vLLM's registry asks for it; kept in the module afterwards."""
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, class_name = class_location(architecture)
    base = getattr(importlib.import_module(module), class_name)
    made = type(name, (SteeredModel, base), {"__module__": __name__, "__doc__": base.__doc__})
    globals()[name] = made
    return made
