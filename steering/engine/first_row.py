"""First row: what a request's row holds before any gate has decided. Knows nothing of steps.

Shapes: `W` columns of a row.
"""

from __future__ import annotations

from steering.engine.bank import Bank, BankedGate
from steering.engine.kernels import ALLOWED, EDIT, FACTOR, GATE, GRADED, HIGH, LOW, ROW_WIDTH, STATE, STRENGTH, Latch
from steering.errors import UnknownName
from steering.plan import Plan, log_odds


def first_row(plan: Plan, gate: BankedGate | None, bank: Bank) -> list[float]:
    """[W] the row of a request on which no gate has decided yet.

    Args:
        plan: what to do.
        gate: the bank's, of a plan that has one.
        bank: numbers the edits.

    Raises:
        UnknownName: the edit is not in the bank, or the gate lacks a category that the plan allows.
    """
    row = [0.0] * ROW_WIDTH
    order = plan.gate
    if gate is None or order is None:
        if plan.edit is not None:
            row[EDIT] = bank.number(bundle=plan.bundle, edit=plan.edit)
            row[STRENGTH] = plan.strength
        return row
    row[STATE] = Latch.PENDING
    row[GATE] = gate.number
    row[LOW], row[HIGH] = log_odds(order.comply_below), log_odds(order.refuse_above)
    row[FACTOR] = 0.0 if order.is_observed else plan.strength
    row[ALLOWED] = _bits(order.profile, order.categories, gate)
    row[GRADED] = order.is_graded
    return row


def _bits(profile: str, allowed: tuple[str, ...] | None, gate: BankedGate) -> int:
    """The categories a gate may choose as bits."""
    if allowed is None:
        return (1 << len(gate.categories)) - 1
    strange = sorted(set(allowed) - set(gate.categories))
    if strange:
        raise UnknownName(f"gate {profile!r} has no categories {strange}; it has {list(gate.categories)}")
    return sum(1 << gate.categories.index(category) for category in set(allowed))
