"""Random steps for the steering op, with what the algebra in `steering.terms` says the result must be.

Run as a program, `python -m tests.unit.engine.cases` under TRITON_INTERPRET=1, it judges the Triton kernel.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from steering.bundle import Bundle
from steering.engine import capture_op, kernels
from steering.engine.bank import Bank
from steering.engine.kernels import Latch
from steering.engine.rows import Rows
from steering.gate import Probe, Ruling, rule
from steering.manifest import MAX_RESPONSE_TOKENS
from steering.plan import Decision, Plan
from steering.terms import Edit, delta
from tests.samples import bundle_in_memory, gate_plan, plan_for, random_edit, random_probe
from tests.unit.engine.sparing import judge_sparing

LAYER = 0
CATEGORIES = ("safety", "political", "humanizing")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Arguments of one call of the op, and the exact result.

    Attributes:
        arguments: hidden [T, D], residual [T, D], token_rows [M + 3], rows [S, 40], table [N, 2D + 8].
        before: a copy of hidden.
        expected: [T, D] float32, hidden + strength · Σ ( gain · <hidden + residual, q> + bias ) · p, not rounded yet.
        is_touched: [T] bool, tokens whose edit has terms at this layer.
        observed: by row, what the response probe writes: [8] scores, NaN where it reads nothing.
        latches: by row, what its gate writes: edit, strength, state, category and scores; the last three are None where
            the gate reads at another layer.
    """

    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    before: Tensor
    expected: Tensor
    is_touched: Tensor
    observed: dict[int, Tensor]
    latches: dict[int, tuple[int, float, int | None, int | None, Tensor | None]]

    @property
    def hidden(self) -> Tensor:
        """The tensor the op writes."""
        return self.arguments[0]


def random_case(seed: int, *, dtype: torch.dtype, width: int = 48, is_strided: bool = False) -> Case:
    """A mixed batch: untouched tokens, several edits of ranks 1 to 32, one without terms at this layer, several rows,
    gates that decide at this layer or at another, with every kind of order, on residuals of which some are NaN, some
    with tokens after the one they decide on, and a response probe that reads at this layer or at another; some tokens
    are muted.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    edits: dict[str, Edit] = {}
    for number in range(draw.randint(1, 4)):
        drawn = draw.randint(1, 8)
        rank = 32 if number == 0 and seed % 4 == 0 else drawn
        edits[f"e{number}"] = random_edit(f"e{number}", ranks={LAYER: rank, 1: 1}, width=width, seed=seed + number)
    edits["elsewhere"] = random_edit("elsewhere", ranks={1: 2}, width=width, seed=seed)
    gates = {}
    for name, layer, offered in (("here", LAYER, list(edits)), ("above", 1, ["elsewhere"])):
        probe = random_probe(name, layer=layer, categories=CATEGORIES, width=width, seed=seed + layer, scale=5.0)
        # One category has no edit to comply and one none to refuse.
        refuse, comply = (
            {category: draw.choice(offered) for category in half} for half in (CATEGORIES[:2], CATEGORIES[1:])
        )
        gates[name] = (probe, refuse, comply)
    reader = random_probe("response", layer=draw.choice([LAYER, 1]), categories=(), width=width, seed=seed, scale=5.0)
    bundle = bundle_in_memory(edits, width=width, gates=gates, response=(reader, MAX_RESPONSE_TOKENS))
    bank = Bank(layers=(LAYER, 1), width=width, terms=160, device=torch.device("cpu"))
    bank.load(bundle)
    tokens = draw.randint(1, 24)
    rows = Rows(bank=bank, requests=20, tokens=tokens + draw.randint(0, 5), device=torch.device("cpu"))
    plans = [_random_plan(draw, list(edits)) for _ in range(draw.randint(1, 9))]
    of_token = torch.randint(0, len(plans) + 1, (tokens,), generator=generator, dtype=torch.int32)
    for number, plan in enumerate(plans, start=1):
        rows.add(str(number), plan, 1)
        if plan.gate is not None:
            places = (of_token == number).nonzero().squeeze(1)
            if draw.random() < 0.5:
                of_token[places] = 0
            of_token[places[:1]] = -number
        elif plan.response:
            places = (of_token == number).nonzero().squeeze(1)[:MAX_RESPONSE_TOKENS]
            of_token[places] += torch.arange(1, len(places) + 1, dtype=torch.int32) << kernels.PLACE
    assert [rows._row_of[str(number)] for number in range(1, len(plans) + 1)] == list(range(1, len(plans) + 1))
    is_muted = torch.rand(tokens, generator=generator) < 0.25
    rows.token_rows[:tokens] = of_token + is_muted * of_token.sign() * (1 << kernels.MUTED)
    counted = (of_token != 0, of_token < 0, of_token >> kernels.PLACE > 0)
    rows.token_rows[-kernels.COUNTS :] = torch.stack(counted).sum(dim=1)
    columns = 3 * width if is_strided else width
    hidden = torch.randn(tokens, columns, generator=generator).to(dtype)[:, :width]
    residual = (torch.randn(tokens, columns, generator=generator) * 5).to(dtype)[:, columns - width :]
    for token in (of_token < 0).nonzero().squeeze(1).tolist():
        if draw.random() < 0.15:
            residual[token, 0] = float("nan")

    x, expected = hidden.float() + residual.float(), hidden.float().clone()
    decides = {-entry: token for token, entry in enumerate(of_token.tolist()) if entry < 0}
    is_touched = torch.zeros(tokens, dtype=torch.bool)
    latches = {}
    observed = {number: torch.full((8,), torch.nan) for number, plan in enumerate(plans, start=1) if plan.response}
    for token, entry in enumerate(of_token.tolist()):
        if not entry:
            continue
        place, signed = (entry >> kernels.PLACE, entry % (1 << kernels.PLACE)) if entry > 0 else (0, entry)
        if place and reader.layer == LAYER:
            observed[signed][place - 1] = reader.logits(x[token])[0]
        name, strength = _chosen(bundle, plans[abs(signed) - 1], x[decides.get(abs(signed), token)])
        for terms in edits[name].layers if name and not is_muted[token] else ():
            if terms.layer == LAYER:
                expected[token] += delta(x[token], terms, strength)
                is_touched[token] = True
        if signed < 0:
            latches[-signed] = _latch(bundle, bank, plans[-signed - 1], x[token])
    return Case(
        arguments=(hidden, residual, rows.token_rows, rows.rows, bank.tables[LAYER]),
        before=hidden.clone(),
        expected=expected,
        is_touched=is_touched,
        observed=observed,
        latches=latches,
    )


def _random_plan(draw: random.Random, edits: list[str]) -> Plan:
    strength = draw.choice([1.0, 0.5, draw.uniform(0.1, 3)])
    if draw.random() < 0.2:
        return plan_for(None, response=True)
    if draw.random() < 0.6:
        response = draw.random() < 0.5
        return plan_for(draw.choice(edits), strength=draw.choice([strength, -strength]), response=response)
    low, high = sorted(draw.choice([0.0, 0.2, 0.5, 0.8, 1.0]) for _ in range(2))
    return gate_plan(
        draw.choice(["here", "here", "here", "above"]),
        strength=strength,
        comply_below=low,
        refuse_above=high,
        categories=draw.choice([None, CATEGORIES[:1], CATEGORIES[1:], CATEGORIES]),
        is_graded=draw.random() < 0.4,
        is_observed=draw.random() < 0.2,
    )


def _ruled(bundle: Bundle, plan: Plan, x: Tensor) -> tuple[Probe, Tensor, Ruling | None] | None:
    """What the reference makes of a gate at this layer; None for another plan."""
    if plan.gate is None or plan.gate.profile != "here":
        return None
    probe = bundle.probes["here"]
    logits = probe.logits(x)
    return probe, logits, rule(logits, plan.gate, probe.categories)


def _chosen(bundle: Bundle, plan: Plan, x: Tensor) -> tuple[str | None, float]:
    """Edit and strength of one token, by the reference."""
    if plan.gate is None:
        return plan.edit, plan.strength
    ruled = _ruled(bundle, plan, x)
    if ruled is None or ruled[2] is None or plan.gate.is_observed:
        return None, 0.0
    probe, _, ruling = ruled
    profile = bundle.manifest.profile("here")
    sides = {Decision.REFUSE: profile.refuse, Decision.COMPLY: profile.comply, Decision.ABSTAIN: {}}
    name = sides[ruling.decision].get(probe.categories[ruling.category])
    return name, plan.strength * ruling.share if name else 0.0


def _latch(
    bundle: Bundle, bank: Bank, plan: Plan, x: Tensor
) -> tuple[int, float, int | None, int | None, Tensor | None]:
    ruled = _ruled(bundle, plan, x)
    if ruled is None:
        return 0, 0.0, Latch.PENDING, None, None
    probe, logits, ruling = ruled
    if ruling is None:
        return 0, 0.0, Latch.FAILED, None, None
    profile = bundle.manifest.profile("here")
    category = probe.categories[ruling.category]
    has_edit = category in {Decision.REFUSE: profile.refuse, Decision.COMPLY: profile.comply}.get(ruling.decision, ())
    state = Latch[ruling.decision.name] if has_edit else Latch.ABSTAIN
    name, strength = _chosen(bundle, plan, x)
    number = bank.number(bundle=bundle.digest, edit=name) if name else 0
    return number, strength, state, ruling.category, logits


def check(case: Case, name: str, *, units: float = 0.5) -> None:
    """After the op ran: touched tokens are the float32 result rounded once, others have every bit they had, each gate
    of this layer has latched what the reference decides, and the response probe has written what it reads.

    Args:
        case: after the op ran on its arguments.
        name: of the case, for the message.
        units: how far one rounding may go, in units in the last place: a half to the nearest, a whole one if cut off.

    Sums may be made in another order than the algebra's, which moves a float32 result by some units in its last place;
    rounding to a smaller dtype can then fall to the neighbour, never further.
    """
    dtype, hidden = case.hidden.dtype, case.hidden
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    same = (hidden.contiguous().view(bits) == case.before.contiguous().view(bits)).all(-1)
    assert bool(same[~case.is_touched].all()), f"{name}: an untouched token was written"
    in_float32 = 2e-5 * case.expected.abs().amax().clamp(min=1.0)
    unit = case.expected.abs().clamp(min=1e-3) * torch.finfo(dtype).eps
    error = (hidden.float() - case.expected).abs()
    allowed = in_float32 if dtype is torch.float32 else units * unit + in_float32
    assert bool((error <= allowed).all()), f"{name}: off by {error.max().item()}"
    if bool(case.is_touched.any()):
        assert not bool(same[case.is_touched].all()), f"{name}: nothing was edited"
    witness = case.arguments[4][0, 2 * hidden.shape[1] + kernels.FIRST].item()
    assert witness == float(bool(case.is_touched.any())), f"{name}: witness {witness}"
    for row, expected in case.observed.items():
        cells = case.arguments[3][row][kernels.RESPONSE + 1 :][: len(expected)]
        assert torch.allclose(cells, expected, atol=1e-4, equal_nan=True), f"{name}: row {row} observed {cells}"
    for row, (edit, strength, state, category, logits) in case.latches.items():
        found = case.arguments[3][row]
        assert int(found[kernels.EDIT]) == edit, f"{name}: row {row} latched another edit"
        assert abs(float(found[kernels.STRENGTH]) - strength) <= 1e-4, f"{name}: row {row} latched another strength"
        assert int(found[kernels.STATE]) == state, f"{name}: row {row} latched state {found[kernels.STATE]}"
        if logits is not None:
            assert int(found[kernels.CATEGORY]) == category, f"{name}: row {row} latched another category"
            scores = found[kernels.SCORES : kernels.SCORES + len(logits)]
            assert torch.allclose(scores, logits, atol=1e-4), f"{name}: row {row} latched other scores"


def judge_capture(seed: int, dtype: torch.dtype, width: int, *, is_strided: bool) -> int:
    """Compare the Triton kernel of the capture op with plain torch on a random step; how many tokens it captured."""
    generator = torch.Generator().manual_seed(seed)
    tokens, columns = 17, 3 * width if is_strided else width
    hidden, residual = (torch.randn(tokens, columns, generator=generator).to(dtype)[:, -width:] for _ in range(2))
    chosen = torch.randperm(tokens, generator=generator)[: 3 + seed]
    slots = torch.zeros(tokens + 4, dtype=torch.int32)
    slots[chosen] = torch.arange(1, len(chosen) + 1, dtype=torch.int32)
    slots[-1] = len(chosen)
    kept = [torch.zeros(tokens + 1, 2, width) for _ in range(2)]
    capture_op.capture_triton(hidden, residual, slots, kept[0][:, 1])
    capture_op.capture_reference(hidden, residual, slots, kept[1][:, 1])
    assert torch.equal(*kept), f"capture {dtype} seed {seed} width {width} strided {is_strided}"
    return len(chosen)


@contextmanager
def backwards() -> Iterator[None]:
    """Triton's interpreter runs the programs of a launch from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def set_grid_idx(x: int, y: int, z: int) -> None:
        builder.grid_idx = (builder.grid_dim[0] - 1 - x, y, z)

    with mock.patch.object(builder, "set_grid_idx", set_grid_idx):
        yield


def main() -> int:
    """Judge the Triton kernel over every dtype, contiguous and not, at widths that are and are not powers of two, with
    programs that run in order and in the opposite one, as on a device they run in any.
    """
    judged = decided = captured = observed = 0
    spared = sum(judge_sparing(kernels.spare_triton, seed) for seed in range(12))
    # Triton's interpreter cuts float32 off to bfloat16 (triton 3.9, `_convert_float`); compiled code rounds (cvt.rn).
    units = {torch.bfloat16: 1.0}
    for dtype_name, dtype in DTYPES.items():
        for seed in range(5):
            for width in (48, 64):
                for is_strided in (False, True):
                    for order in (nullcontext, backwards):
                        case = random_case(seed, dtype=dtype, width=width, is_strided=is_strided)
                        with order():
                            kernels.edit_triton(*case.arguments)
                        name = f"triton {dtype_name} seed {seed} width {width} strided {is_strided} {order.__name__}"
                        check(case, name, units=units.get(dtype, 0.5))
                        judged += int(case.is_touched.sum())
                        decided += len(case.latches)
                        observed += sum(int(scores.isfinite().sum()) for scores in case.observed.values())
                    captured += judge_capture(seed, dtype, width, is_strided=is_strided)
    sys.stdout.write(
        f"spared: {spared}, captured: {captured}, observed: {observed}, decided: {decided}, tokens judged: {judged}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
