"""Relaxation: where one resolution can be more compliant than another, whatever the prompt.

A gate's rule is known, so that this needs no prompt: for every category, and for every refusal probability between two
thresholds, what both would do is written out and compared. What cannot be compared, such as two different edits, counts
as more compliant. Pure; knows nothing of HTTP, torch or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from server.catalog import ProbeView
from server.policy import Resolution
from steering.plan import CategorySource, GateOrder, Mode

_REFUSE, _NEITHER, _COMPLY = 1, 0, -1

ROUNDING = 1e-9
"""Strengths this close are the same, relative to their size."""


class _Act(NamedTuple):
    """What is done to one answer: a side, by which edit, how strongly; `edit` holds all that makes two comparable."""

    side: int
    edit: tuple[object, ...] = ()
    strength: float = 0.0


class _Cell:
    """A threshold, or what lies between two of them: `inside` tells which rule applies, `ends` where it is extreme."""

    __slots__ = ("ends", "inside")

    def __init__(self, *ends: float) -> None:
        self.ends = ends
        self.inside = sum(ends) / len(ends)


class _Behaviour:
    """What a resolution would do to any prompt.

    Attributes:
        order: of the gate; None where no gate decides.
        probe: that the gate reads.
        source: who tells the category.
        categories: those the gate chooses among; none where no gate does.
        thresholds: of the gate.
    """

    def __init__(self, resolution: Resolution) -> None:
        plan, gate = resolution.plan, resolution.profile.gate
        self.resolution = resolution
        self.order: GateOrder | None = None if plan is None else plan.gate
        self.probe: ProbeView | None = None
        self.source: CategorySource | None = resolution.category_source
        self.categories: tuple[str, ...] = ()
        self.thresholds: tuple[float, ...] = ()
        if self.order is not None and gate is not None:
            self.probe = gate.probe
            self.categories = self.order.categories or gate.probe.categories
            self.thresholds = (self.order.comply_below, self.order.refuse_above)

    def act(self, cell: _Cell, probability: float, category: str | None) -> _Act:
        """What is done at a refusal probability in a cell, to a prompt that is taken for a category."""
        resolution, order = self.resolution, self.order
        plan = resolution.plan
        if plan is None:
            return _Act(_NEITHER)
        if order is None:
            return self._edited(_REFUSE if resolution.mode is Mode.REFUSE else _COMPLY, plan.edit, 1.0)
        if order.refuse_above < 1 and cell.inside >= order.refuse_above:
            return self._chosen(_REFUSE, resolution.profile.refuse, category, probability)
        if order.comply_below > 0 and cell.inside <= order.comply_below:
            return self._chosen(_COMPLY, resolution.profile.comply, category, probability)
        return _Act(_NEITHER)

    def _chosen(self, side: int, edits: Mapping[str, str], category: str | None, probability: float) -> _Act:
        """By the gate; a side without an edit for the category is the neutral band."""
        order = self.order
        assert order is not None
        if category is None or category not in edits:
            return _Act(_NEITHER)
        if not order.is_graded:
            return self._edited(side, edits[category], 1.0)
        room = 1 - order.refuse_above if side == _REFUSE else order.comply_below
        way = probability - order.refuse_above if side == _REFUSE else order.comply_below - probability
        return self._edited(side, edits[category], min(1.0, max(0.0, way / room)))

    def _edited(self, side: int, edit: str | None, share: float) -> _Act:
        plan = self.resolution.plan
        assert plan is not None
        # The profile as well: two of them may be steered for different shares of requests.
        comparable = (plan.bundle, self.resolution.profile.name, edit, plan.scope, plan.reasoning)
        return _Act(side, comparable, plan.strength * share)


def lowered(asked: Resolution, otherwise: Resolution) -> frozenset[str]:
    """Categories of prompts for which `asked` can be more compliant than `otherwise`; all that are known where the
    latter tells none apart. Empty where it never is.
    """
    if asked.plan == otherwise.plan and asked.profile.name == otherwise.profile.name:
        return frozenset()
    new, old = _Behaviour(asked), _Behaviour(otherwise)
    places = [(ours, at, theirs, there) for ours, theirs in _cells(new, old) for at, there in _ends(ours, theirs)]
    # None stands for prompts of which nobody says what they are.
    worse = {category for category in old.categories or (None,) if _is_lowered(new, old, category, places)}
    if None in worse:
        return frozenset(asked.bundle.categories) | frozenset(otherwise.bundle.categories)
    return frozenset(category for category in worse if category is not None)


def _is_lowered(
    new: _Behaviour, old: _Behaviour, category: str | None, places: Sequence[tuple[_Cell, float, _Cell, float]]
) -> bool:
    return any(
        _is_more_compliant(new.act(ours, at, taken_for), old.act(theirs, there, category))
        for taken_for in _taken_for(new, old, category)
        for ours, at, theirs, there in places
    )


def _taken_for(new: _Behaviour, old: _Behaviour, category: str | None) -> Iterable[str | None]:
    """What `new` may take a prompt for that `old` takes for this category."""
    if new.order is None:
        return (None,)
    is_same_choice = new.probe == old.probe and new.source == old.source and {*new.categories} <= {*old.categories}
    return (category,) if is_same_choice and category in new.categories else new.categories


def _cells(new: _Behaviour, old: _Behaviour) -> Iterator[tuple[_Cell, _Cell]]:
    """Where both read the same probability they are compared at the same one, else at any two."""
    if new.order is None or old.order is None or new.probe == old.probe:
        for cell in _between({*new.thresholds, *old.thresholds}):
            yield cell, cell
        return
    for ours in _between({*new.thresholds}):
        for theirs in _between({*old.thresholds}):
            yield ours, theirs


def _between(thresholds: Iterable[float]) -> Iterator[_Cell]:
    points = sorted({0.0, 1.0, *thresholds})
    yield from map(_Cell, points)
    for low, high in pairwise(points):
        yield _Cell(low, high)


def _ends(ours: _Cell, theirs: _Cell) -> Iterator[tuple[float, float]]:
    """Strengths are linear within a cell, so that its ends tell."""
    if ours is theirs:
        yield from ((end, end) for end in ours.ends)
        return
    yield from ((at, there) for at in ours.ends for there in theirs.ends)


def _is_more_compliant(new: _Act, old: _Act) -> bool:
    if new.side != old.side:
        return new.side < old.side
    if new.side == _NEITHER:
        return False
    margin = ROUNDING * max(new.strength, old.strength)
    is_weaker = new.strength < old.strength - margin if new.side == _REFUSE else new.strength > old.strength + margin
    return new.edit != old.edit or is_weaker
