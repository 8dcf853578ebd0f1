"""The refusal categories of P1's tokens and one more, and which of them a record falls under."""

from __future__ import annotations

from steering.fit.datasets import Record
from steering.fit.sources import Label

SAFETY = "Requests with safety concerns"
HUMANIZING = "Humanizing requests"
INCOMPLETE = "Incomplete requests"
INDETERMINATE = "Indeterminate requests"
UNSUPPORTED = "Unsupported requests"
POLITICAL = "Political"
CATEGORIES = (HUMANIZING, INCOMPLETE, INDETERMINATE, SAFETY, UNSUPPORTED, POLITICAL)
"""P1's five categories, in the order of its tokens, and `Political`."""


PLAIN = "Plain requests"
"""What a category head calls prompts that no refusal is about. A gate has nothing to lower there and leaves them alone;
the paper, which knows refusal categories only, pushes each such prompt away from a refusal it would not get."""


def refusal_category(record: Record) -> str | None:
    """The category a refusal of the record's prompt belongs to; None for plainly benign prompts.

    Questions on China count as political also where they are borderline or harmless.
    """
    if record.dataset in ("deccp", "ccp_sensitive"):
        return POLITICAL
    if record.label in (Label.BENIGN, Label.PHRASE):
        return None
    if record.category in CATEGORIES:
        return record.category
    return SAFETY
