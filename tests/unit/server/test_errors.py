"""Every error has a status, a type and an envelope."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import server.errors as edge_errors
from server.errors import TABLE, envelope_bytes, reply_to
from steering.errors import CallerError, EngineError, OperatorError, TrimtabError


def tree(root: type[TrimtabError]) -> Iterator[type[TrimtabError]]:
    """A class and all below it."""
    yield root
    for below in root.__subclasses__():
        yield from tree(below)


@pytest.mark.parametrize("error", list(tree(TrimtabError)), ids=lambda cls: cls.__name__)
def test_every_error_is_answered_as_its_branch_says(error: type[TrimtabError]) -> None:
    """The caller's faults are 4xx, all others 5xx; 503 tells when to come back, other 5xx that it is no use."""
    reply = reply_to(error("message"))
    if issubclass(error, CallerError):
        assert 400 <= reply.status < 500
        of_status = {403: "permission_error", 429: "rate_limit_error"}
        assert reply.type == of_status.get(reply.status, "invalid_request_error")
    else:
        assert 500 <= reply.status < 600
        assert reply.type == "server_error"
        assert ("retry-after" in reply.headers) == (reply.status == 503)
        assert (reply.headers.get("x-should-retry") == "false") == (reply.status != 503)


@pytest.mark.parametrize("error", list(tree(TrimtabError)), ids=lambda cls: cls.__name__)
def test_envelope_is_openais(error: type[TrimtabError]) -> None:
    """Message, type, param and code, the code a string, whatever the error."""
    body = json.loads(envelope_bytes(error("what \ud800 went wrong", parameter="n")))
    assert list(body) == ["error"]
    assert body["error"]["param"] == "n"
    assert body["error"]["code"] == error.code
    assert isinstance(body["error"]["code"], str)
    assert body["error"]["message"] == "what ? went wrong"


def test_branches_have_entries() -> None:
    """No branch falls through to the entry of the root."""
    assert {TrimtabError, CallerError, OperatorError, EngineError} <= set(TABLE)
    own = [
        cls for cls in vars(edge_errors).values() if isinstance(cls, type) and cls.__module__ == edge_errors.__name__
    ]
    assert all(cls in TABLE for cls in own if issubclass(cls, TrimtabError))
