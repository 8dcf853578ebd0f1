"""Random steps for the op that keeps edits off reasoning, judged token by token."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from steering.engine.kernels import AWAITED, MUTED, PLACE, ROW_WIDTH

END = 7


def judge_sparing(op: Callable[[Tensor, Tensor, Tensor], None], seed: int) -> int:
    """Run the op on a random step: rows that wait, have waited or never wait, of 1 to 400 consecutive tokens, with none
    or several ends at any place, entries of gates and of response probes, and untouched tokens between.

    Returns:
        How many tokens it muted.
    """
    draw = random.Random(seed)
    rows = torch.rand(12, ROW_WIDTH)
    rows[:, AWAITED] = 0
    ids, entries, expected, waits_after = [], [], [], {}
    for row in draw.sample(range(1, 12), 9):
        untouched = draw.choice([0, 0, 1, 5])
        ids += [draw.choice([END, 3]) for _ in range(untouched)]
        entries += [0] * untouched
        expected += [0] * untouched
        length = draw.choice([1, 1, 2, 3, 127, 128, 129, 256, 400])
        own = [draw.choice([0, 1, 2**31 - 1, END + 1]) for _ in range(length)]
        for _ in range(draw.choice([0, 1, 1, 2])):
            own[draw.choice([0, length - 1, draw.randrange(length)])] = END
        ids += own
        waits = draw.random() < 0.8
        rows[row, AWAITED] = END + 1 if waits else 0
        for place, token in enumerate(own):
            entry = -row if place == 0 and draw.random() < 0.3 else row | (draw.choice([0, 1, 8]) << PLACE)
            waits = waits and token != END
            entries.append(entry)
            expected.append((abs(entry) | waits << MUTED) * (1 if entry > 0 else -1))
        waits_after[row] = waits
    # Beyond the step, as when the map is longer than it.
    token_rows = torch.tensor([*entries, 5, 5, len(entries), 0, 0], dtype=torch.int32)
    step = torch.tensor(ids, dtype=draw.choice([torch.int32, torch.int64]))
    kept = rows.clone()
    op(step, token_rows, rows)
    assert token_rows.tolist() == [*expected, 5, 5, len(entries), 0, 0], f"seed {seed}"
    kept[:, AWAITED] = torch.tensor([float(END + 1) * waits_after.get(row, 0) for row in range(12)])
    assert torch.equal(rows, kept), f"seed {seed}: rows"
    return sum(abs(entry) >> MUTED for entry in expected)
