"""Inline SVG by hand: a frame with axes, and marks in it. Colours are CSS variables, so that one drawing reads in light
and in dark.

Knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = tuple(f"var(--c{number})" for number in range(1, 9))
"""Of series, in order; the page defines them."""

Point = tuple[float, float]


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turned: bool = False) -> str:
    """One line of text; `kind` is a class of the page's style."""
    turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{name}{turn}>{escape(words)}</text>'


def line(start: Point, end: Point, kind: str, colour: str = "") -> str:
    """A straight line."""
    stroke = f' style="stroke:{colour}"' if colour else ""
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" class="{kind}"{stroke}/>'


def box(x: float, y: float, width: float, height: float, fill: str, tip: str = "", opacity: float = 1.0) -> str:
    """A filled rectangle with a tooltip."""
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    seen = "" if opacity >= 1 else f";fill-opacity:{number(opacity)}"
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" height="{number(max(0.0, height))}" '
        f'style="fill:{fill}{seen}">{inside}</rect>'
    )


def drawing(width: float, height: float, marks: Iterable[str], label: str) -> str:
    """A whole SVG element that scales with the page."""
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(marks)}</svg>'
    )


@dataclass(slots=True, kw_only=True)
class Frame:
    """A plot area with axes; data coordinates go in, marks pile up.

    Attributes:
        x, y: ranges of the data.
        width, height: of the whole drawing, margins and all.
    """

    x: Point
    y: Point
    width: float = 560
    height: float = 380
    left: float = 58
    right: float = 16
    top: float = 14
    bottom: float = 46
    marks: list[str] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        """Data to drawing coordinates."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (point[0] - x0) / ((x1 - x0) or 1.0)
        up = (point[1] - y0) / ((y1 - y0) or 1.0)
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float], suffix: str = ""
    ) -> None:
        """Grid, tick labels and names of both axes."""
        for tick in x_ticks:
            foot = self.at((tick, self.y[0]))
            self.marks += [
                line(foot, self.at((tick, self.y[1])), "grid"),
                text(foot[0], foot[1] + 16, f"{tick:g}{suffix}", anchor="middle", kind="tick"),
            ]
        for tick in y_ticks:
            foot = self.at((self.x[0], tick))
            self.marks += [
                line(foot, self.at((self.x[1], tick)), "grid"),
                text(foot[0] - 7, foot[1] + 4, f"{tick:g}{suffix}", anchor="end", kind="tick"),
            ]
        middle = (self.left + self.width - self.right) / 2
        self.marks.append(text(middle, self.height - 8, x_label, anchor="middle", kind="axis"))
        centre = (self.top + self.height - self.bottom) / 2
        self.marks.append(text(14, centre, y_label, anchor="middle", kind="axis", turned=True))

    def path(self, points: Sequence[Point], colour: str, *, dashed: bool = False, tip: str = "") -> None:
        """A line through points."""
        if len(points) < 2:
            return
        places = " ".join(f"{number(x)},{number(y)}" for x, y in map(self.at, points))
        dash = ";stroke-dasharray:5 4" if dashed else ""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        self.marks.append(f'<polyline points="{places}" class="path" style="stroke:{colour}{dash}">{inside}</polyline>')

    def band(self, points: Sequence[tuple[float, float, float]], colour: str) -> None:
        """An area between two ends (x, low, high)."""
        if len(points) < 2:
            return
        corners = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in reversed(points)]
        places = " ".join(f"{number(x)},{number(y)}" for x, y in map(self.at, corners))
        self.marks.append(f'<polygon points="{places}" style="fill:{colour};fill-opacity:.14"/>')

    def dot(self, point: Point, colour: str, *, radius: float = 4, label: str = "", tip: str = "") -> None:
        """A mark, with a short label inside where it is big enough."""
        x, y = self.at(point)
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        self.marks.append(
            f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" style="fill:{colour}" class="dot">{inside}'
            "</circle>"
        )
        if label:
            self.marks.append(text(x, y + 3.6, label, anchor="middle", kind="inside"))

    def cross(self, point: Point, x: Point, y: Point, colour: str) -> None:
        """Both intervals of a point."""
        self.marks.append(line(self.at((x[0], point[1])), self.at((x[1], point[1])), "error", colour))
        self.marks.append(line(self.at((point[0], y[0])), self.at((point[0], y[1])), "error", colour))

    def done(self, label: str) -> str:
        """The drawing."""
        return drawing(self.width, self.height, self.marks, label)
