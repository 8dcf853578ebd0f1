"""Reports: what is told of a steered request, read from its row once the forward pass that made it known has run.

Knows nothing of steps or vLLM. Shapes: `W` columns of a row.
"""

from __future__ import annotations

import math
import struct

from steering.engine.bank import Bank
from steering.engine.kernels import BROKEN, CATEGORY, EDIT, RESPONSE, SCORES, STATE, STRENGTH, Latch
from steering.engine.steered import Steered
from steering.manifest import MAX_RESPONSE_TOKENS
from steering.outcome import Outcome, Response, Scores
from steering.plan import Decision

_DECISIONS = {float(Latch.REFUSE): Decision.REFUSE, float(Latch.COMPLY): Decision.COMPLY}
_DECISIONS[float(Latch.ABSTAIN)] = Decision.ABSTAIN
_UNDECIDED = (float(Latch.FIXED), float(Latch.PENDING))
_FLOAT, _READ = struct.Struct("f"), struct.Struct(f"{MAX_RESPONSE_TOKENS}f")
_BROKEN = BROKEN * _FLOAT.size


def outcome_of(steered: Steered, table: memoryview, place: int, bank: Bank) -> Outcome:
    """What came of a due request, once its forward pass has run; its latch is kept for a later preemption.

    Args:
        steered: as `Rows.write_step` gave it.
        table: bytes of rows [S, W] float32, as that pass left them.
        place: where in them the request's row begins.
        bank: knows the edits by number.
    """
    plan, gate = steered.order.plan, steered.order.gate
    if _FLOAT.unpack_from(table, place + _BROKEN)[0]:
        return _failed(steered, "the residuals are not finite")
    if gate is None:
        return Outcome(
            plan_id=steered.plan_id,
            request_id=steered.request_id,
            applied=True,
            edit=plan.edit,
            strength=plan.strength,
            scope=plan.scope,
            reasoning=plan.reasoning,
        )
    values = steered.order.told.unpack_from(table, place)
    state = values[STATE]
    if state in _UNDECIDED:
        return _failed(steered, "the gate did not run at its layer")
    steered.latched = values
    if state == Latch.FAILED:
        return _failed(steered, "the probe's scores are not finite")
    edit = bank.name(int(values[EDIT]))
    return Outcome(
        plan_id=steered.plan_id,
        request_id=steered.request_id,
        applied=edit is not None,
        edit=edit,
        strength=values[STRENGTH],
        scope=plan.scope,
        reasoning=plan.reasoning,
        decision=_DECISIONS[state],
        category=gate.categories[int(values[CATEGORY])],
        scores=Scores(names=gate.categories, logits=values[SCORES:]),
    )


def response_of(steered: Steered, table: memoryview, place: int) -> Response | None:
    """What the response probe has read of an observed request so far; None where it was nothing finite.

    Arguments are those of `outcome_of`.
    """
    fresh = _READ.unpack_from(table, place + _FLOAT.size * (RESPONSE + 1))
    # Not all that was read before a preemption is read again: it may come back from the prefix cache.
    steered.scores = tuple(
        new if math.isfinite(new) else known for new, known in zip(fresh, steered.scores, strict=True)
    )
    known = [score for score in steered.scores if math.isfinite(score)]
    if not known:
        return None
    return Response(
        plan_id=steered.plan_id,
        request_id=steered.request_id,
        tokens=len(known),
        score=math.fsum(known) / len(known),
    )


def _failed(steered: Steered, error: str) -> Outcome:
    plan = steered.order.plan
    return Outcome(
        plan_id=steered.plan_id,
        request_id=steered.request_id,
        applied=False,
        edit=None,
        strength=0.0,
        scope=plan.scope,
        reasoning=plan.reasoning,
        error=error,
    )
