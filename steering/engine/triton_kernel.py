"""The steering ops in Triton, for CUDA devices and for Triton's interpreter.

Same contract as `compiled.run`, which `kernels` describes. Imported only where Triton is needed: at import Triton
decides, by `TRITON_INTERPRET`, whether kernels are compiled or interpreted.

There is no path over matrix products (`tl.dot`) for blocks of tokens that share one edit. A program reads the
directions of its token's edit, R · 2 · D floats: 1 MB at rank 32 and width 4096, which stays in the L2 cache, so 2 GB
of L2 for a prompt of 2,048 tokens, some 0.4 ms a layer at 5 TB/s beside about 1.5 ms for the layer itself; at rank 1
the 50 MB of residuals from memory are all there is. So products could only help edits of high rank at many layers and
of scope `all` (`generated` edits one token of a prompt). They would also have to be exact: tensor cores round float32
to 10 bits of mantissa unless products are split in three. Whether that is worth it is to be measured on a device;
none of these numbers has been.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_WARPS = 8
FLOATS_PER_WARP = 1024
"""One warp per 1,024 columns (32 lanes × 32 registers): the whole row of x and the running sum stay in registers."""


SPARED_AT_ONCE = 128
"""Tokens of a row that are looked at together; a row has one in all but recomputed steps."""

PITCH: tl.constexpr = tl.constexpr(40)
"""`kernels.ROW_WIDTH`. Offsets below are those of `kernels`; a jitted function sees constants of its own module."""


@triton.jit  # type: ignore[untyped-decorator]
def decide(x, columns, inside, row, table, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`compiled._decide` for one token: let the gate of `row` decide and write the latch."""
    gate = tl.load(row + 3).to(tl.int64)
    head = table + gate * (2 * WIDTH + 8) + 2 * WIDTH
    count = tl.load(head + 5).to(tl.int32)
    if count != 0:
        terms = table + tl.load(head + 4).to(tl.int64) * (2 * WIDTH + 8)
        allowed = tl.load(row + 7).to(tl.int32)
        refusal = 0.0
        best = float("-inf")
        category = 0
        strange = 0
        for number in range(count):
            term = terms + number * (2 * WIDTH + 8)
            weight = tl.load(term + columns, mask=inside, other=0.0)
            score = tl.sum(x * weight, axis=0) + tl.load(term + 2 * WIDTH + 1)
            tl.store(row + 10 + number, score)
            strange += (score - score != 0.0).to(tl.int32)  # infinity and NaN
            refusal = tl.where(number == 0, score, refusal)
            is_allowed = ((allowed << 1) >> number) & 1  # never the first, which is no category
            is_best = (is_allowed == 1) & (score > best)
            best = tl.where(is_best, score, best)
            category = tl.where(is_best, number - 1, category)
        low = tl.load(row + 4)
        high = tl.load(row + 5)
        factor = tl.load(row + 6)
        scalars = terms + (category + 1) * (2 * WIDTH + 8) + 2 * WIDTH
        refuses = refusal >= high
        complies = (refusal <= low) & (refusal < high)
        chosen = tl.where(refuses, tl.load(scalars + 6), tl.where(complies, tl.load(scalars + 7), 0.0))
        side = tl.where(refuses, 2.0, 3.0)
        side = tl.where(chosen == 0.0, 4.0, side)
        floor = 1.0 / (1.0 + tl.exp(-low))
        ceiling = 1.0 / (1.0 + tl.exp(-high))
        probability = 1.0 / (1.0 + tl.exp(-refusal))
        room = tl.where(refuses, 1.0 - ceiling, floor)
        way = tl.where(refuses, probability - ceiling, floor - probability)
        grade = tl.minimum(tl.maximum(way / tl.where(room > 0.0, room, 1.0), 0.0), 1.0)
        share = tl.where((tl.load(row + 8) != 0.0) & (room > 0.0), grade, 1.0)
        is_applied = (strange == 0) & (chosen != 0.0) & (factor != 0.0)
        tl.store(row, tl.where(is_applied, chosen, 0.0))
        tl.store(row + 1, tl.where(is_applied, factor * share, 0.0))
        tl.store(row + 2, tl.where(strange == 0, side, 5.0))
        tl.store(row + 9, category * 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def observe(x, columns, inside, row, place, table, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the score of the response probe of `row` for one token, if it reads at this layer."""
    probe = tl.load(row + 27).to(tl.int64)
    head = table + probe * (2 * WIDTH + 8) + 2 * WIDTH
    if (probe != 0) & (tl.load(head + 5) != 0.0):
        term = table + tl.load(head + 4).to(tl.int64) * (2 * WIDTH + 8)
        weight = tl.load(term + columns, mask=inside, other=0.0)
        tl.store(row + 27 + place, tl.sum(x * weight, axis=0) + tl.load(term + 2 * WIDTH + 1))


@triton.jit  # type: ignore[untyped-decorator]
def decide_kernel(  # type: ignore[no-untyped-def]
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
    """One program per token: those that a gate decides on write their row's latch, all others leave at once.

    A launch of its own, since programs run in any order: where a request's prompt ends in the midst of a step (an
    answer is given, or computed again), the tokens after it read in the next launch what was decided here.
    """
    token = tl.program_id(0).to(tl.int64)
    number = tl.load(token_rows + token)
    if number < 0:
        row = rows + (-number & 0xFFFFFF).to(tl.int64) * PITCH
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        decide(x, columns, inside, row, table, WIDTH)


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
    """One program per token; lets the response probe read it, walks the terms of its edit, writes `hidden` once."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.load(token_rows + token)
    if number != 0:
        place = (tl.abs(number) >> 24) & 15
        muted = tl.abs(number) >> 28
        row = rows + (tl.abs(number) & 0xFFFFFF).to(tl.int64) * PITCH
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        edit = tl.load(row)
        strength = tl.load(row + 1)
        if (number > 0) & (place > 0):
            x = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            observe(x, columns, inside, row, place, table, WIDTH)
        head = table + edit.to(tl.int64) * (2 * WIDTH + 8) + 2 * WIDTH
        count = tl.load(head + 3).to(tl.int32)
        if (count != 0) & (muted == 0):
            first = tl.load(head + 2).to(tl.int64)
            old = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
            x = old + tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            total = tl.zeros([BLOCK], dtype=tl.float32)
            for offset in range(count):
                term = table + (first + offset) * (2 * WIDTH + 8)
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
    """Launch one program per token of the step that decides, then one that edits; shapes as in `kernels`.

    Both at every layer that carries the op, whatever is loaded: a captured graph holds the launches it was made with.
    """
    tokens, width = hidden.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(width)
    for kernel in (decide_kernel, edit_kernel):
        kernel[(tokens,)](
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


@triton.jit  # type: ignore[untyped-decorator]
def spare_kernel(input_ids, token_rows, rows, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per token; the one at the first token of a row that waits mutes what comes before its end."""
    start = tl.program_id(0)
    row = tl.abs(tl.load(token_rows + start)) & 0xFFFFFF
    # The program of the row before may be writing this entry: it changes the bit of muting, never the row.
    before = tl.abs(tl.load(token_rows + start - 1, mask=start > 0, other=0)) & 0xFFFFFF
    if (row != 0) & (before != row):
        cell = rows + row.to(tl.int64) * PITCH + 36
        awaited = tl.load(cell).to(tl.int32)
        offsets = tl.arange(0, BLOCK)
        while (awaited != 0) & (start < tokens):
            entries = tl.load(token_rows + start + offsets, mask=start + offsets < tokens, other=0)
            own = (tl.abs(entries) & 0xFFFFFF) == row
            length = tl.min(tl.where(own, BLOCK, offsets), axis=0)
            ids = tl.load(input_ids + start + offsets, mask=own, other=-1)
            end = tl.min(tl.where(own & (ids + 1 == awaited), offsets, BLOCK), axis=0)
            muted = tl.abs(entries) | 0x10000000
            tl.store(
                token_rows + start + offsets,
                tl.where(entries < 0, -muted, muted),
                mask=own & (offsets < tl.minimum(end, length)),
            )
            if end < length:
                tl.store(cell, 0.0)
                awaited = awaited * 0
            start = tl.where(length < BLOCK, tokens, start + BLOCK)


def launch_spare(input_ids: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """Launch one program per token of the step; shapes as in `kernels`."""
    if len(input_ids):
        spare_kernel[(len(input_ids),)](input_ids, token_rows, rows, len(input_ids), BLOCK=SPARED_AT_ONCE, num_warps=1)


@triton.jit  # type: ignore[untyped-decorator]
def capture_kernel(  # type: ignore[no-untyped-def]
    hidden,
    residual,
    slots,
    kept,
    hidden_stride,
    residual_stride,
    kept_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token; same contract as `capture_op.capture_reference`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot != 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(kept + slot * kept_stride + columns, x, mask=inside)


def launch_capture(hidden: Tensor, residual: Tensor, slots: Tensor, kept: Tensor) -> None:
    """Launch one program per token of the step; shapes as in `capture_op`."""
    tokens, width = hidden.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(width)
    capture_kernel[(tokens,)](
        hidden,
        residual,
        slots,
        kept,
        hidden.stride(0),
        residual.stride(0),
        kept.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=min(MAX_WARPS, max(1, block // FLOATS_PER_WARP)),
    )
