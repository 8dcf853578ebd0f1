"""Trace context: the headers of W3C's recommendation, as far as they can be passed on.

Knows nothing of exporters, vLLM or torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_STATE = re.compile(r"[\x20-\x7e]{1,512}")


def trace_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The trace context among a request's headers; empty where there is none, or one that is not well-formed.

    Args:
        headers: of ASGI, names in lower case.
    """
    given = {name: value.decode("latin-1") for name, value in headers if name in (b"traceparent", b"tracestate")}
    parent, state = given.get(b"traceparent", ""), given.get(b"tracestate", "")
    if not _PARENT.fullmatch(parent):
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if _STATE.fullmatch(state) else {})


def trace_id_of(headers: Mapping[str, str]) -> str | None:
    """The id of the trace, 32 hexadecimal digits; None where there is none."""
    found = _PARENT.fullmatch(headers.get("traceparent", ""))
    return found.group(1) if found else None


def exemplar_of(headers: Mapping[str, str]) -> dict[str, str] | None:
    """Ids of a trace and its span, as exemplars name them; None where there is none, or one that is not sampled."""
    found = _PARENT.fullmatch(headers.get("traceparent", ""))
    if found is None or not int(found.group(3), 16) & 1:
        return None
    return {"trace_id": found.group(1), "span_id": found.group(2)}
