"""Errors as the client sees them: one table from error class to status, OpenAI type and headers.

A class without an entry of its own takes that of its nearest ancestor; a test walks the tree of `steering.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from steering.errors import (
    AuditUnavailable,
    CallerError,
    CapacityExceeded,
    EditNotApplied,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineTimeout,
    OperatorError,
    PluginNotArmed,
    TrimtabError,
    UnknownModel,
)


class BodyTooLarge(CallerError):
    """The request's body has more bytes than the server reads."""

    code = "request_too_large"


class BodyTimeout(CallerError):
    """The request's body did not arrive in time."""

    code = "request_timeout"


class HeadersTooLarge(CallerError):
    """The request's line and headers have more bytes or fields than the server reads."""

    code = "headers_too_large"


class UnsupportedMedia(CallerError):
    """The request's body is not plain JSON."""

    code = "unsupported_media_type"


class UnknownRoute(CallerError):
    """No such path."""

    code = "not_found"


class WrongMethod(CallerError):
    """The path exists, but not with this method."""

    code = "method_not_allowed"


class Rejection(CallerError):
    """Whoever sent the request may not have what it asks for, or not now.

    Args:
        reason: label value of `steering_rejections`.
    """

    def __init__(
        self, message: str, *, parameter: str | None = None, code: str | None = None, reason: str = "other"
    ) -> None:
        super().__init__(message, parameter=parameter, code=code)
        self.reason = reason


class InvalidKey(Rejection):
    """No API key came with the request, or none that is known here."""

    code = "invalid_api_key"


class PermissionDenied(Rejection):
    """The key's permissions do not include what the request asks for."""

    code = "permission_denied"


class RateLimited(Rejection):
    """The key's limits are used up for now."""

    code = "rate_limit_exceeded"


class UnknownBundle(CallerError):
    """No such bundle is loaded, or lies in the folder that bundles may be loaded from."""

    code = "bundle_not_found"


class BundleRefused(CallerError):
    """The bundle that an operator named cannot be used here; the code is that of what was found."""

    code = "bundle_refused"


class BundleInTheWay(CallerError):
    """What an operator asks of a bundle does not go with the bundles that are loaded."""

    code = "bundle_conflict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How an error is answered.

    Attributes:
        status: of HTTP.
        type: OpenAI's coarse class, as in the envelope.
        headers: sent with it; the OpenAI SDK obeys `retry-after` and `x-should-retry`.
    """

    status: int
    type: str
    headers: Mapping[str, str] = field(default_factory=dict)


_NO_RETRY = {"x-should-retry": "false"}

TABLE: Mapping[type[TrimtabError], Reply] = {
    TrimtabError: Reply(status=500, type="server_error", headers=_NO_RETRY),
    CallerError: Reply(status=400, type="invalid_request_error"),
    BodyTooLarge: Reply(status=413, type="invalid_request_error"),
    # 400 and not 408, which the SDK would send again.
    BodyTimeout: Reply(status=400, type="invalid_request_error", headers={"connection": "close"}),
    HeadersTooLarge: Reply(status=431, type="invalid_request_error"),
    UnsupportedMedia: Reply(status=415, type="invalid_request_error"),
    UnknownBundle: Reply(status=404, type="invalid_request_error"),
    BundleRefused: Reply(status=422, type="invalid_request_error"),
    BundleInTheWay: Reply(status=409, type="invalid_request_error"),
    UnknownRoute: Reply(status=404, type="invalid_request_error"),
    WrongMethod: Reply(status=405, type="invalid_request_error"),
    Rejection: Reply(status=403, type="permission_error"),
    InvalidKey: Reply(status=401, type="invalid_request_error", headers={"www-authenticate": "Bearer"}),
    PermissionDenied: Reply(status=403, type="permission_error"),
    # `retry-after` says when, which differs from request to request: `server/access/admission.py` sets it.
    RateLimited: Reply(status=429, type="rate_limit_error"),
    UnknownModel: Reply(status=404, type="invalid_request_error"),
    OperatorError: Reply(status=500, type="server_error", headers=_NO_RETRY),
    AuditUnavailable: Reply(status=503, type="server_error", headers={"retry-after": "5"}),
    PluginNotArmed: Reply(status=503, type="server_error", headers={"retry-after": "5"}),
    EngineError: Reply(status=500, type="server_error", headers=_NO_RETRY),
    # The same request would be steered the same way and fail the same way.
    EditNotApplied: Reply(status=500, type="server_error", headers=_NO_RETRY),
    CapacityExceeded: Reply(status=503, type="server_error", headers={"retry-after": "1"}),
    EngineOverloaded: Reply(status=503, type="server_error", headers={"retry-after": "1"}),
    # The work was done once and thrown away; sending it again makes the queue longer.
    EngineTimeout: Reply(status=504, type="server_error", headers=_NO_RETRY),
    EngineDied: Reply(status=503, type="server_error", headers={"retry-after": "5"}),
}


def reply_to(error: TrimtabError) -> Reply:
    """How this error is answered."""
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def envelope(error: TrimtabError) -> dict[str, Any]:
    """OpenAI's error object; the body of an answer, or the frame that ends a stream."""
    return {
        "error": {
            "message": error.message,
            "type": reply_to(error).type,
            "param": error.parameter,
            "code": error.code,
        }
    }


def envelope_bytes(error: TrimtabError) -> bytes:
    """`envelope` as JSON; what is no UTF-8 in a message is written as a question mark."""
    body = envelope(error)
    body["error"]["message"] = error.message.encode("utf-8", errors="replace").decode()
    return to_json(body)
