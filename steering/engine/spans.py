"""Spans: which consecutive rows of one layer's table are taken, and by which edit, gate or response probe.

Nothing outside a table names its rows but the heads in that table, so it can be packed while requests run. On a device
whatever is written here is ordered after the steps launched so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steering.engine.kernels import EDITS, FIRST, GATE_COUNT, GATE_FIRST, OF_RESPONSE, REFUSE_EDIT, SCALARS


@dataclass(slots=True, kw_only=True, eq=False)
class Span:
    """Consecutive rows of a layer's table, and who has them.

    Attributes:
        layer: whose table it is.
        first, count: which rows; `first` changes when the table is packed.
        number: of the edit, gate or response probe.
        head: column at which the row of that number holds `first`, and `count` next to it: FIRST or GATE_FIRST.
    """

    layer: int
    first: int
    count: int
    number: int
    head: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + self.count)


class Spans:
    """Gives and takes rows of a table [N, 2D + 8], laid out as `kernels` says.

    Attributes:
        taken: rows that are taken.
    """

    def __init__(self, layer: int, table: Tensor) -> None:
        self._layer, self._table = layer, table
        self._spans: list[Span] = []
        self._scalars = table.shape[1] - SCALARS

    @property
    def taken(self) -> int:
        """Rows that are taken."""
        return sum(span.count for span in self._spans)

    @property
    def gates(self) -> set[int]:
        """Numbers of the gates and response probes that read here."""
        return {span.number for span in self._spans if span.head == GATE_FIRST}

    def take(self, count: int, *, number: int, head: int) -> Span:
        """Take rows, of which so many must be free, and say in the table where they are; it is packed if need be."""
        place = _gap(self._spans, count, len(self._table))
        if place is None:
            self._pack()
            place = _gap(self._spans, count, len(self._table))
        assert place is not None
        index, first = place
        span = Span(layer=self._layer, first=first, count=count, number=number, head=head)
        self._spans.insert(index, span)
        self._point(span)
        self._count(span, 1.0)
        return span

    def give(self, span: Span) -> None:
        """Give rows back: they and what the table says of them become 0."""
        self._clear(span)
        self._table[span.number, self._scalars + span.head : self._scalars + span.head + 2] = 0.0
        self._count(span, -1.0)
        self._spans.remove(span)

    def _count(self, span: Span, change: float) -> None:
        """Say in row 0 that there is one more or one less of its kind."""
        if span.head == GATE_FIRST and span.count == 1:  # a gate has the scores of categories as well
            change *= OF_RESPONSE
        self._table[0, self._scalars + (EDITS if span.head == FIRST else GATE_COUNT)] += change

    def _pack(self) -> None:
        """Move what is taken together, so that all free rows are at the end."""
        end = 0
        for span in self._spans:
            if span.first != end:
                old = self._table[span.rows].clone()
                self._clear(span)
                span.first = end
                for columns in self._columns():
                    self._table[span.rows, columns] = old[:, columns]
                self._point(span)
            end += span.count

    def _point(self, span: Span) -> None:
        self._table[span.number, self._scalars + span.head] = float(span.first)
        self._table[span.number, self._scalars + span.head + 1] = float(span.count)

    def _clear(self, span: Span) -> None:
        for columns in self._columns():
            self._table[span.rows, columns] = 0.0

    def _columns(self) -> tuple[slice, slice]:
        """Columns of a term or score; those between them belong to the edit and the gate of the row's number."""
        return slice(0, self._scalars + FIRST), slice(self._scalars + REFUSE_EDIT, self._scalars + SCALARS)


def _gap(spans: Sequence[Span], count: int, rows: int) -> tuple[int, int] | None:
    """Where `count` consecutive rows are free: the place in `spans` and the first row; None for nowhere."""
    end = 0
    for index, span in enumerate(spans):
        if span.first - end >= count:
            return index, end
        end = span.first + span.count
    return (len(spans), end) if rows - end >= count else None
