"""Random steps for the steering op, with what the algebra in `steering.terms` says the result must be.

Run as a program, `python -m tests.unit.engine.cases` under TRITON_INTERPRET=1, it judges the Triton kernel.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.engine import kernels
from steering.engine.bank import Bank
from steering.terms import Edit, delta
from tests.samples import bundle_in_memory, random_edit

LAYER = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Arguments of one call of the op, and the exact result.

    Attributes:
        arguments: hidden [T, D], residual [T, D], token_rows [M + 1], rows [S, 2], table [N, 2D + 4].
        before: a copy of hidden.
        expected: [T, D] float32, hidden + strength · Σ ( gain · <hidden + residual, q> + bias ) · p, not rounded yet.
        is_touched: [T] bool, tokens whose edit has terms at this layer.
    """

    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    before: Tensor
    expected: Tensor
    is_touched: Tensor

    @property
    def hidden(self) -> Tensor:
        """The tensor the op writes."""
        return self.arguments[0]


def random_case(seed: int, *, dtype: torch.dtype, width: int = 48, is_strided: bool = False) -> Case:
    """A mixed batch: untouched tokens, several edits of ranks 1 to 8, one without terms at this layer, several rows."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    edits: dict[str, Edit] = {
        f"e{number}": random_edit(
            f"e{number}", ranks={LAYER: draw.randint(1, 8), 1: 1}, width=width, seed=seed + number
        )
        for number in range(draw.randint(1, 4))
    }
    edits["elsewhere"] = random_edit("elsewhere", ranks={1: 2}, width=width, seed=seed)
    bundle = bundle_in_memory(edits, width=width)
    bank = Bank(layers=(LAYER, 1), width=width, terms=48, device=torch.device("cpu"))
    bank.load(bundle)
    names = [draw.choice(list(edits)) for _ in range(draw.randint(1, 9))]
    strengths = [draw.choice([1.0, -1.0, 0.5, draw.uniform(-3, 3)]) for _ in names]
    rows = torch.zeros(len(names) + 1, 2)
    for row, (name, strength) in enumerate(zip(names, strengths, strict=True), start=1):
        rows[row] = torch.tensor([bank.number(bundle=bundle.digest, edit=name), strength])
    tokens = draw.randint(1, 24)
    of_token = torch.randint(0, len(rows), (tokens,), generator=generator, dtype=torch.int32)
    token_rows = torch.zeros(tokens + draw.randint(0, 5) + 1, dtype=torch.int32)
    token_rows[:tokens], token_rows[-1] = of_token, int((of_token > 0).sum())
    columns = 3 * width if is_strided else width
    hidden = torch.randn(tokens, columns, generator=generator).to(dtype)[:, :width]
    residual = (torch.randn(tokens, columns, generator=generator) * 5).to(dtype)[:, columns - width :]

    x, expected = hidden.float() + residual.float(), hidden.float()
    is_touched = torch.zeros(tokens, dtype=torch.bool)
    for token, row in enumerate(of_token.tolist()):
        for terms in edits[names[row - 1]].layers if row else ():
            if terms.layer == LAYER:
                expected[token] += delta(x[token], terms, strengths[row - 1])
                is_touched[token] = True
    return Case(
        arguments=(hidden, residual, token_rows, rows, bank.tables[LAYER]),
        before=hidden.clone(),
        expected=expected,
        is_touched=is_touched,
    )


def check(case: Case, name: str, *, units: float = 0.5) -> None:
    """After the op ran: touched tokens are the float32 result rounded once, others have every bit they had.

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


def main() -> int:
    """Judge the Triton kernel over every dtype, contiguous and not, at widths that are and are not powers of two."""
    judged = 0
    # Triton's interpreter cuts float32 off to bfloat16 (triton 3.9, `_convert_float`); compiled code rounds (cvt.rn).
    units = {torch.bfloat16: 1.0}
    for dtype_name, dtype in DTYPES.items():
        for seed in range(3):
            for width in (48, 64):
                for is_strided in (False, True):
                    case = random_case(seed, dtype=dtype, width=width, is_strided=is_strided)
                    kernels.edit_triton(*case.arguments)
                    check(
                        case,
                        f"triton {dtype_name} seed {seed} width {width} strided {is_strided}",
                        units=units.get(dtype, 0.5),
                    )
                    judged += int(case.is_touched.sum())
    sys.stdout.write(f"tokens judged: {judged}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
