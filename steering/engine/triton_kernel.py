"""The steering op in Triton, for CUDA devices and for Triton's interpreter.

Same contract as `kernels.edit_reference`. Imported only where Triton is needed: at import Triton decides, by
`TRITON_INTERPRET`, whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_WARPS = 8
FLOATS_PER_WARP = 1024
"""One warp per 1,024 columns (32 lanes × 32 registers): the whole row of x and the running sum stay in registers."""


@triton.jit  # type: ignore[untyped-decorator]
def edit_kernel(  # type: ignore[no-untyped-def]
    hidden,
    residual,
    token_rows,
    rows,
    table,
    hidden_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token; walks the terms of that token's edit and writes `hidden` once."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_rows + token)
    if row != 0:
        edit = tl.load(rows + 2 * row).to(tl.int64)
        strength = tl.load(rows + 2 * row + 1)
        head = table + edit * (2 * WIDTH + 4) + 2 * WIDTH
        count = tl.load(head + 3).to(tl.int32)
        if count != 0:
            first = tl.load(head + 2).to(tl.int64)
            columns = tl.arange(0, BLOCK)
            inside = columns < WIDTH
            old = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
            x = old + tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            total = tl.zeros([BLOCK], dtype=tl.float32)
            for offset in range(count):
                term = table + (first + offset) * (2 * WIDTH + 4)
                gain = tl.load(term + 2 * WIDTH)
                coefficient = tl.load(term + 2 * WIDTH + 1)
                if gain != 0.0:
                    read = tl.load(term + columns, mask=inside, other=0.0)
                    coefficient += gain * tl.sum(x * read, axis=0)
                write = tl.load(term + WIDTH + columns, mask=inside, other=0.0)
                total += strength * coefficient * write
            new = (old + total).to(hidden.dtype.element_ty)
            tl.store(hidden + token * hidden_stride + columns, new, mask=inside)
            # Every program stores the same 1, so the race is harmless; see `kernels` for what the witness proves.
            tl.store(table + 2 * WIDTH + 2, 1.0)


def launch(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Launch one program per token of the step; shapes as in `kernels`."""
    tokens, width = hidden.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(width)
    edit_kernel[(tokens,)](
        hidden,
        residual,
        token_rows,
        rows,
        table,
        hidden.stride(0),
        residual.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=min(MAX_WARPS, max(1, block // FLOATS_PER_WARP)),
    )
