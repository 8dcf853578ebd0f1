"""Orders: what requests have in common whose plans differ in nothing but their id, worked out once.

Knows nothing of steps.

Shapes: `W` columns of a row.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from steering.engine.bank import Bank, BankedGate, BankedResponse
from steering.engine.kernels import (
    ALLOWED,
    EDIT,
    FACTOR,
    GATE,
    GRADED,
    HIGH,
    LOW,
    RESPONSE,
    ROW,
    ROW_WIDTH,
    SCORES,
    STATE,
    STRENGTH,
    Latch,
)
from steering.errors import UnknownName
from steering.manifest import MAX_RESPONSE_TOKENS
from steering.plan import Plan, Reasoning, log_odds

MOST = 1024
"""Orders that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """What a worker makes of a plan.

    Attributes:
        plan: of whichever request.
        gate: the gate that decides; None for a plan that names its edit or only observes.
        response: the probe that reads the answer; None for none.
        row: [W] float32, what a row holds before any gate has decided.
        is_spared: its edit waits for the end of reasoning.
        told: the leading columns of a row, up to the last score of its gate: all that a gate reads and writes.
    """

    plan: Plan
    gate: BankedGate | None
    response: BankedResponse | None
    row: bytes
    is_spared: bool
    told: struct.Struct


class Orders:
    """The orders of one worker.

    Args:
        bank: numbers edits, gates and response probes.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._changes = bank.changes
        self._orders: dict[int, Order] = {}
        """By the identity of the plan, which each keeps."""

    def of(self, plan: Plan) -> Order:
        """The order of a plan, which many requests may share.

        Raises:
            UnknownName: the edit, gate or response probe is not in the bank, or the gate lacks a category that the plan
                allows.
        """
        if self._changes != self._bank.changes:  # numbers may mean something else
            self._orders.clear()
            self._changes = self._bank.changes
        order = self._orders.get(id(plan))
        if order is None:
            order = self._made(plan)
            if len(self._orders) >= MOST:
                self._orders.clear()
            self._orders[id(plan)] = order
        return order

    def _made(self, plan: Plan) -> Order:
        gate = None if plan.gate is None else self._bank.gate(bundle=plan.bundle, profile=plan.gate.profile)
        response = self._bank.response(bundle=plan.bundle) if plan.response else None
        row = _first_row(plan, gate, self._bank)
        if response is not None:
            row[RESPONSE] = response.number
            row[RESPONSE + 1 : RESPONSE + 1 + MAX_RESPONSE_TOKENS] = [math.nan] * MAX_RESPONSE_TOKENS
        told = struct.Struct(f"{SCORES + (0 if gate is None else 1 + len(gate.categories))}f")
        is_spared = plan.reasoning is Reasoning.SPARED
        return Order(plan=plan, gate=gate, response=response, row=ROW.pack(*row), is_spared=is_spared, told=told)


def _first_row(plan: Plan, gate: BankedGate | None, bank: Bank) -> list[float]:
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
