"""The steering op on the CPU, compiled by Numba: one pass over the step's steered tokens, no array made per operation.

A step of an idle engine calls each layer's op once, with everything else it needs gone from the processor's caches: the
same work in NumPy and torch, some forty small calls, then takes about a millisecond. Here it is one call. Numba comes
with vLLM. `steering.engine.kernels` describes the arguments.

Shapes: `T` tokens of the step, `S` rows, `N` terms of a layer's table, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from steering.engine.kernels import (
    ALLOWED,
    AWAITED,
    BIAS,
    CATEGORY,
    COMPLY_EDIT,
    COUNT,
    DECIDED,
    EDIT,
    FACTOR,
    FIRST,
    GAIN,
    GATE,
    GATE_COUNT,
    GATE_FIRST,
    GRADED,
    HIGH,
    LOW,
    MUTED,
    OBSERVED,
    PLACE,
    REFUSE_EDIT,
    RESPONSE,
    ROW_WIDTH,
    SCALARS,
    SCORES,
    STATE,
    STRENGTH,
    TOUCHED,
    Latch,
)

_REFUSE, _COMPLY, _ABSTAIN, _FAILED = (int(each) for each in (Latch.REFUSE, Latch.COMPLY, Latch.ABSTAIN, Latch.FAILED))
_ROW, _PLACES, _MUTE = (1 << PLACE) - 1, (1 << (MUTED - PLACE)) - 1, 1 << MUTED
_NO_BITS = np.empty((0, 0), np.uint16)


def run(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """The op on the CPU's tensors, as `kernels` describes them; sums in float32, rounded once when written.

    float32 is read where it is; of any other dtype a float32 copy is made. For bfloat16 there is `steer_at`.
    """
    wide, other, of_token = hidden.to(torch.float32), residual.to(torch.float32), token_rows.numpy()[: len(hidden)]
    _steer(wide.numpy(), other.numpy(), _NO_BITS, _NO_BITS, of_token, rows.numpy(), table.numpy())
    if wide is not hidden:
        hidden.copy_(wide)


def spare(input_ids: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """The op that keeps edits off reasoning, on the CPU's tensors."""
    ids = input_ids.numpy().astype(np.int32, copy=False)
    _spare(ids, token_rows.numpy()[: len(ids)], rows.numpy())


def _compiled(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function, for one signature at once or else when it is called.

    What was compiled is kept beside this file or in the user's cache; where neither can be written each process
    compiles anew.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        # Sums may be reordered, so that they are vectorised; what is infinite or no number stays so.
        options: dict[str, Any] = {"fastmath": {"reassoc", "contract"}, "error_model": "numpy"}
        try:
            return numba.njit(*signature, cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(*signature, **options)(function)

    return compile_


@_compiled()
def _load(floats: Any, bits: Any, token: int, values: Any) -> None:
    """Read a token's half of the residual into `values` [D] float32."""
    if floats.shape[0]:
        for d in range(len(values)):
            values[d] = floats[token, d]
        return
    words = values.view(np.uint32)
    for d in range(len(values)):
        words[d] = np.uint32(bits[token, d]) << np.uint32(16)


@_compiled()
def _store(floats: Any, bits: Any, token: int, values: Any) -> None:
    """Write `values` [D] float32 as a token's half of the residual, to nearest with ties to even."""
    if floats.shape[0]:
        for d in range(len(values)):
            floats[token, d] = values[d]
        return
    words = values.view(np.uint32)
    for d in range(len(values)):
        word = words[d]
        if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # no number stays none
            bits[token, d] = np.uint16((word >> np.uint32(16)) | np.uint32(0x40))
        else:
            odd = (word >> np.uint32(16)) & np.uint32(1)
            bits[token, d] = np.uint16((word + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_compiled()
def _read(x: Any, table: Any, term: int) -> Any:
    """<x, q> of one term, float32."""
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d] * table[term, d]
    return total


@_compiled()
def _share(refusal: Any, low: Any, high: Any, is_refusal: bool) -> Any:
    """Of the way from the threshold to certainty, how much the refusal score has gone: 0 to 1, in probabilities."""
    one = np.float32(1)
    probability, floor, ceiling = (
        one / (one + np.exp(-refusal)),
        one / (one + np.exp(-low)),
        one / (one + np.exp(-high)),
    )
    room = one - ceiling if is_refusal else floor
    way = probability - ceiling if is_refusal else floor - probability
    return min(max(way / room, np.float32(0)), one) if room > 0 else one


@_compiled()
def _decide(x: Any, row: Any, table: Any, gate: int) -> None:
    """Latch into `row` [W] what a gate decides on `x` [D]: `steering.gate.rule`."""
    scalars = 2 * len(x)
    first, count = int(table[gate, scalars + GATE_FIRST]), int(table[gate, scalars + GATE_COUNT])
    allowed, best, category, is_finite = int(row[ALLOWED]), np.float32(-np.inf), 0, True
    for n in range(count):
        score = _read(x, table, first + n) + table[first + n, scalars + BIAS]
        is_finite = is_finite and bool(np.isfinite(score))
        row[SCORES + n] = score
        if n and (allowed >> (n - 1)) & 1 and score > best:
            best, category = score, n - 1
    refusal, low, high, factor = row[SCORES], row[LOW], row[HIGH], row[FACTOR]
    state, chosen = _ABSTAIN, 0
    if refusal >= high:
        state, chosen = _REFUSE, int(table[first + 1 + category, scalars + REFUSE_EDIT])
    elif refusal <= low:
        state, chosen = _COMPLY, int(table[first + 1 + category, scalars + COMPLY_EDIT])
    if chosen == 0:
        state = _ABSTAIN
    share = np.float32(1)
    if row[GRADED] != 0 and chosen:
        share = _share(refusal, low, high, state == _REFUSE)
    is_applied = is_finite and chosen != 0 and factor != 0
    row[EDIT] = chosen if is_applied else 0
    row[STRENGTH] = factor * share if is_applied else np.float32(0)
    row[STATE] = state if is_finite else _FAILED
    row[CATEGORY] = category


@_compiled()
def _add(x: Any, row: Any, table: Any, new: Any) -> None:
    """Add to `new` [D] what the row's edit makes of `x` [D]."""
    width, edit, strength = len(x), int(row[EDIT]), row[STRENGTH]
    first, count = int(table[edit, 2 * width + FIRST]), int(table[edit, 2 * width + COUNT])
    total = np.zeros(width, np.float32)
    for n in range(first, first + count):
        gain, coefficient = table[n, 2 * width + GAIN], table[n, 2 * width + BIAS]
        if gain != 0:  # a term without gain reads nothing, also where x is infinite
            coefficient += gain * _read(x, table, n)
        coefficient *= strength
        for d in range(width):
            total[d] += coefficient * table[n, width + d]
    for d in range(width):
        new[d] += total[d]


_NUMBERS = numba.types.Array(numba.int64, 1, "C")
_LIMITS = numba.types.Array(numba.int64, 2, "C")
_STEP = numba.types.Array(numba.int32, 1, "A", readonly=True)
_TOKENS = numba.types.Array(numba.int32, 1, "C")

FIRST_EDITED, LAST_OF_PROMPT, DECIDES, READ_FROM, READ_TO = range(5)
"""Columns of a row's limits, which are positions: from which one on it is edited; the last one of a prompt that has not
been in a step yet, and the same where a gate decides there; and of which tokens, without the last, the response probe
reads."""

NEVER = np.iinfo(np.int64).max // 2
"""A limit that is never reached."""

IS_DUE, IS_READ, IS_READ_TO_THE_END = 1, 2, 4
"""What there is to say of a request: the last token of its prompt is in the step, or has been; tokens of it are read in
this step; and no later ones will be."""


@_compiled(numba.types.UniTuple(numba.int64, 2)(_TOKENS, _NUMBERS, _LIMITS, _STEP, _STEP, numba.int64, _NUMBERS))
def fill(target: Any, of_request: Any, limits: Any, tokens: Any, computed: Any, written: Any, news: Any) -> Any:
    """Write the row of every token of a step, and the numbers behind them, as `kernels` describes `token_rows`.

    Args:
        target: [M + 3] int32, written up to the step's number of tokens, and at its end.
        of_request: [B] row of each request, of a longer array.
        limits: [S, 5] by row; what has been reached will not be again.
        tokens: [B] int32, tokens of each request in this step.
        computed: [B] int32, tokens of each request computed before it.
        written: leading entries of `target` that are not 0 after the last step; those beyond this one's become so.
        news: [B] written from its beginning on, for requests of which there is something to say: eight times their
            place in the batch, and what there is.

    Returns:
        How many tokens there are, and how many requests in `news`.
    """
    place = touched = decided = observed = told = 0
    for n in range(len(tokens)):
        row, begin, end = of_request[n], np.int64(computed[n]), np.int64(computed[n]) + tokens[n]
        first_edited, decides = limits[row, FIRST_EDITED], limits[row, DECIDES]
        read_from, read_to = limits[row, READ_FROM], limits[row, READ_TO]
        what = 0
        for position in range(begin, end):
            entry = row if position >= first_edited else 0
            if position == decides:
                entry = -row
                decided += 1
            if read_from <= position < read_to:
                entry = row | ((position - read_from + 1) << PLACE)
                observed += 1
                what |= IS_READ
            target[place] = entry
            touched += entry != 0
            place += 1
        if end > limits[row, LAST_OF_PROMPT]:
            what |= IS_DUE
            limits[row, LAST_OF_PROMPT] = limits[row, DECIDES] = NEVER
        if end >= read_to:
            what |= IS_READ_TO_THE_END
            limits[row, READ_FROM] = limits[row, READ_TO] = NEVER
        if what:
            news[told] = 8 * n + what
            told += 1
    for k in range(place, written):
        target[k] = 0
    target[TOUCHED], target[DECIDED], target[OBSERVED] = touched, decided, observed
    return place, told


_FLOATS, _BITS = numba.types.Array(numba.float32, 2, "A"), numba.types.Array(numba.uint16, 2, "A")
_TABLE = numba.types.Array(numba.float32, 2, "C")


@_compiled(numba.void(_TOKENS, _TOKENS, _TABLE))
def _spare(ids: Any, of_token: Any, rows: Any) -> None:
    """Mute [T] tokens of rows that wait for the end of reasoning; one at which it ends makes its row wait no more."""
    for token in range(len(ids)):
        entry = abs(of_token[token])
        row = rows[entry & _ROW]
        awaited = int(row[AWAITED])
        if awaited and ids[token] + 1 == awaited:
            row[AWAITED] = 0
        elif awaited:
            muted = entry | _MUTE
            of_token[token] = muted if of_token[token] > 0 else -muted


@_compiled(numba.void(_FLOATS, _FLOATS, _BITS, _BITS, _TOKENS, _TABLE, _TABLE))
def _steer(
    hidden: Any, residual: Any, hidden_bits: Any, residual_bits: Any, of_token: Any, rows: Any, table: Any
) -> None:
    """Residuals are float32 [T, D] or, where those are empty, the bits of bfloat16."""
    width = (table.shape[1] - SCALARS) // 2
    old, x = np.empty(width, np.float32), np.empty(width, np.float32)
    has_gates = table[0, 2 * width + GATE_COUNT] != 0
    for token in range(len(of_token)):
        entry = abs(of_token[token])
        row, place, is_muted = rows[entry & _ROW], (entry >> PLACE) & _PLACES, (entry & _MUTE) != 0
        gate = probe = 0
        if has_gates and of_token[token] < 0:
            gate = int(row[GATE])
        elif has_gates and place:
            probe = int(row[RESPONSE])
        is_deciding = gate != 0 and table[gate, 2 * width + GATE_COUNT] != 0
        is_observed = probe != 0 and table[probe, 2 * width + GATE_COUNT] != 0
        is_edited = not is_muted and table[int(row[EDIT]), 2 * width + COUNT] != 0
        if entry == 0 or not (is_deciding or is_observed or is_edited):
            continue
        _load(hidden, hidden_bits, token, old)
        _load(residual, residual_bits, token, x)
        for d in range(width):
            x[d] += old[d]
        if is_deciding:
            _decide(x, row, table, gate)
        if is_observed:
            term = int(table[probe, 2 * width + GATE_FIRST])
            row[RESPONSE + place] = _read(x, table, term) + table[term, 2 * width + BIAS]
        if not is_muted and table[int(row[EDIT]), 2 * width + COUNT] != 0:
            _add(x, row, table, old)
            _store(hidden, hidden_bits, token, old)
            table[0, 2 * width + FIRST] = 1


_COUNT = numba.int64


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_typing: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to numbers of a kind; Numba has no such cast."""
    pointer = numba.types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, kind), generate


@_compiled(numba.void(*[_COUNT] * 11))
def steer_at(  # noqa: PLR0917 - plain numbers are what is fast to hand over
    hidden: Any,
    hidden_stride: Any,
    residual: Any,
    residual_stride: Any,
    tokens: Any,
    of_token: Any,
    rows: Any,
    row_count: Any,
    table: Any,
    terms: Any,
    columns: Any,
) -> None:
    """`_steer` on the bits of bfloat16, given addresses, sizes, and strides of rows in elements."""
    width = (columns - SCALARS) // 2
    none = np.empty((0, 0), np.float32)
    hidden_bits = numba.carray(_pointer(hidden, numba.uint16), (tokens * hidden_stride,))
    residual_bits = numba.carray(_pointer(residual, numba.uint16), (tokens * residual_stride,))
    _steer(
        none,
        none,
        as_strided(hidden_bits, (tokens, width), (2 * hidden_stride, 2)),
        as_strided(residual_bits, (tokens, width), (2 * residual_stride, 2)),
        numba.carray(_pointer(of_token, numba.int32), (tokens,)),
        numba.carray(_pointer(rows, numba.float32), (row_count, ROW_WIDTH)),
        numba.carray(_pointer(table, numba.float32), (terms, columns)),
    )
