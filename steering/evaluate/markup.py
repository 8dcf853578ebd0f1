"""Bits of HTML that a report is made of. Knows nothing of what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def cell(rate: Mapping[str, Any] | None) -> str:
    """A rate in percent with its interval; n as tooltip."""
    if rate is None or not rate["n"]:
        return '<span class="none">n/a</span>'
    return (
        f'<span title="{rate["count"]} of {rate["n"]}">{100 * rate["rate"]:.1f} '
        f"<small>[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]</small></span>"
    )


def signed(facts: Mapping[str, Any]) -> str:
    """A paired difference in points with its interval; n and p as tooltip."""
    return (
        f'<span title="n = {facts["n"]}, p = {facts["p"]:g}">{100 * facts["difference"]:+.1f} '
        f"<small>[{100 * facts['low']:+.1f}, {100 * facts['high']:+.1f}]</small></span>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide; cells are markup already, heads are not."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{one}</td>" for one in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(drawn: str, caption: str) -> str:
    """A drawing with its caption; nothing where there is no drawing."""
    return (
        f'<figure><div class="wide">{drawn}</div><figcaption>{escape(caption)}</figcaption></figure>' if drawn else ""
    )


def details(title: str, inside: str, *, is_open: bool = False) -> str:
    """Something that opens on a click."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{inside}</details>"


def paragraph(words: str, *, is_markup: bool = False) -> str:
    """A paragraph."""
    return f"<p>{words if is_markup else escape(words)}</p>"


def list_of(entries: Sequence[str]) -> str:
    """A bulleted list; nothing where there are no entries."""
    return "<ul>" + "".join(f"<li>{escape(entry)}</li>" for entry in entries) + "</ul>" if entries else ""
