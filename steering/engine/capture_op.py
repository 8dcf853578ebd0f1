"""The capture op: one call per captured layer copies the residual of the step's wanted tokens into a buffer.

`torch.ops.trimtab.capture(hidden, residual, slots, kept)` has two implementations with one contract, as the steering op
in `kernels` has: plain torch (CPU, and the reference) and a Triton kernel (CUDA). It is opaque to the compiler and no
splitting op; only the contents of its fixed buffers change between steps.

Shapes: `T` tokens of the step, `M` most tokens of a step, `K` most tokens captured in a step, `D` residual width.

    hidden      [T, D]      one half of the residual stream; not modified; strides of the row are free
    residual    [T, D]      the other half: x = hidden + residual
    slots       [M + 1]     int32, where each token's residual goes, 1 to K; 0 means nowhere. On the CPU the last entry
                            is the number of captured tokens, so that a step without any costs one comparison
    kept        [K + 1, D]  float32, row `slot` gets x, summed in float32; strides of the row are free
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LIBRARY = torch.library.Library("trimtab", "FRAGMENT")


def capture_reference(hidden: Tensor, residual: Tensor, slots: Tensor, kept: Tensor) -> None:
    """Plain torch on the CPU."""
    of_step = slots.numpy()
    if of_step[-1] == 0:
        return
    of_token = of_step[: hidden.shape[0]]
    at = np.flatnonzero(of_token)
    where = torch.from_numpy(at)
    kept[torch.from_numpy(of_token[at].astype(np.int64))] = hidden[where].to(torch.float32) + residual[where]


def capture_triton(hidden: Tensor, residual: Tensor, slots: Tensor, kept: Tensor) -> None:
    """The Triton kernel: one program per token, which leaves at once when its slot is 0."""
    from steering.engine.triton_kernel import launch_capture

    launch_capture(hidden, residual, slots, kept)


def _capture_fake(hidden: Tensor, residual: Tensor, slots: Tensor, kept: Tensor) -> None:
    """Shapes for the compiler: the op returns nothing."""


def _define() -> None:
    # It is `kept` that is written, and `hidden` that is declared: in a compiled graph nothing else reads `kept`, whose
    # layers share one storage, which the compiler would copy at every call; and `hidden`, which runs through all calls
    # of this op and of the steering op, keeps this one in its place before the edit of its own layer.
    _LIBRARY.define("capture(Tensor(a!) hidden, Tensor residual, Tensor slots, Tensor kept) -> ()")
    on_cpu: Any = capture_triton if os.environ.get("TRIMTAB_KERNEL") == "triton" else capture_reference
    _LIBRARY.impl("capture", on_cpu, "CPU")
    _LIBRARY.impl("capture", capture_triton, "CUDA")
    torch.library.register_fake("trimtab::capture", _capture_fake, lib=_LIBRARY)


_define()
