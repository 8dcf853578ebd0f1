"""Errors of the project, split into what the caller can fix and what the operator must.

    TrimtabError
    ├── CallerError                   the request is at fault: 4xx
    │   ├── InvalidSpec               a field has a wrong type, range or combination
    │   ├── UnknownName               a profile, category or edit that is not loaded
    │   │   └── UnknownModel          a model that is not served: 404
    │   └── NotSupported              well-formed, but this server cannot do it
    ├── OperatorError                 the set-up is at fault: the server does not start, or is not ready
    │   ├── BundleError
    │   │   ├── BundleFormatError     a field, tensor, dtype, shape or number is wrong
    │   │   ├── BundleDigestError     bytes differ from what the manifest or the caller names
    │   │   ├── BundleSignatureError  not signed, or not by the key, or changed since
    │   │   └── FingerprintMismatch   the bundle was made for another model
    │   ├── DatasetError
    │   │   ├── DatasetMissing        a set is not on this machine; the message says how to get it
    │   │   ├── DatasetCorrupt        a file differs from the digest the registry names
    │   │   └── DatasetMisuse         a set may not be used for what was asked (fit on a test set)
    │   ├── FitError                  what a fit was given cannot be fitted on
    │   │   ├── PromptFileError       a file of prompts cannot be read; names file and line
    │   │   ├── TooFewPrompts         a class of prompts is empty, one-sided or too small
    │   │   ├── ActivationsNotFinite  residuals hold NaN or infinity; names layer and prompts
    │   │   └── UnknownPreset         a preset has no constants for this model; says for which it has
    │   ├── CaptureError              captured residuals are missing, not finite, or those of other prompts
    │   ├── UnsupportedArchitecture   the model class is not in the plugin's table
    │   ├── UnsupportedConfiguration  a vLLM option that steering is not proved to work with
    │   ├── KeyFileError              the file of API keys cannot be read, or must not be trusted
    │   ├── AuditUnavailable          what must be on record cannot be written down: 503
    │   └── PluginNotArmed            a worker does not report what the server needs
    └── EngineError                   a request failed inside: 5xx
        ├── EditNotApplied            the engine did not confirm the edit of a steered request
        │   ├── EditNotConfirmed      it said nothing of it in time
        │   └── EditFailed            it said that it could not
        ├── CapacityExceeded          no row or bank slot left: 503, never unsteered
        ├── EngineOverloaded          queue full or draining: 503
        ├── EngineTimeout             the engine did not answer in time: 504
        └── EngineDied                the engine is gone: 503

Adding an error: put it in the tree, give it a docstring and a status in `server/errors.py`; a test walks the tree.
Errors cross process borders, so they stay picklable: positional message, keyword facts with defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TrimtabError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: what was given, what was possible, what to do.
        parameter: path of the request field at fault, such as `steering.strength`; None when no field is.
        code: stable machine-readable reason, such as `steering_unknown_profile`.
    """

    code: str = "error"

    def __init__(self, message: str, *, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code or type(self).code

    def to_fields(self) -> dict[str, str | None]:
        """As plain JSON, for borders that no exception crosses; `from_fields` makes it one again."""
        return {
            "class": type(self).__name__,
            "message": self.message,
            "parameter": self.parameter,
            "code": self.code,
        }

    @staticmethod
    def from_fields(fields: Mapping[str, str | None]) -> TrimtabError:
        """The error that `to_fields` was called on; a plain `TrimtabError` where this process lacks its class."""
        known: list[type[TrimtabError]] = [TrimtabError]
        for cls in known:
            known.extend(cls.__subclasses__())
        found = next((cls for cls in known if cls.__name__ == fields["class"]), TrimtabError)
        return found(fields["message"] or "", parameter=fields["parameter"], code=fields["code"])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.parameter, self.code)


def _rebuild(cls: type[TrimtabError], message: str, parameter: str | None, code: str) -> TrimtabError:
    return cls(message, parameter=parameter, code=code)


class CallerError(TrimtabError):
    """The request is at fault and can be corrected by whoever sent it."""

    code = "invalid_request"


class InvalidSpec(CallerError):
    """A field has a wrong type, is out of range, or does not go with another field."""

    code = "steering_invalid"


class UnknownName(CallerError):
    """A profile, category or edit that no loaded bundle has."""

    code = "steering_unknown_name"


class UnknownModel(UnknownName):
    """A model name that this server does not serve."""

    code = "model_not_found"


class NotSupported(CallerError):
    """Well-formed, but this server or bundle cannot do it."""

    code = "steering_not_supported"


class OperatorError(TrimtabError):
    """The set-up is at fault: the server does not start, or does not become ready."""

    code = "misconfigured"


class BundleError(OperatorError):
    """A bundle cannot be used."""

    code = "bundle_error"


class BundleFormatError(BundleError):
    """A manifest field, tensor, dtype, shape or number is not what the format asks for."""

    code = "bundle_format"


class BundleDigestError(BundleError):
    """Bytes on disk differ from the digest that names them."""

    code = "bundle_digest"


class BundleSignatureError(BundleError):
    """A bundle is not signed by the key that is asked for, or has changed since."""

    code = "bundle_signature"


class FingerprintMismatch(BundleError):
    """The bundle was made for another model, tokenizer or chat template."""

    code = "bundle_fingerprint"


class DatasetError(OperatorError):
    """A data set cannot be used."""

    code = "dataset_error"


class DatasetMissing(DatasetError):
    """A data set is not on this machine."""

    code = "dataset_missing"


class DatasetCorrupt(DatasetError):
    """A data file differs from the digest in the registry."""

    code = "dataset_corrupt"


class DatasetMisuse(DatasetError):
    """A data set was asked for a use it is not allowed for, such as fitting on a test set."""

    code = "dataset_misuse"


class FitError(OperatorError):
    """What a fit was given cannot be fitted on."""

    code = "fit_error"


class PromptFileError(FitError):
    """A file of prompts cannot be read."""

    code = "prompt_file"


class TooFewPrompts(FitError):
    """A class of prompts is empty, one-sided or too small."""

    code = "too_few_prompts"


class ActivationsNotFinite(FitError):
    """Residuals hold NaN or infinity, so that no direction can be made of them."""

    code = "activations_not_finite"


class UnknownPreset(FitError):
    """A preset has no constants for this model."""

    code = "unknown_preset"


class CaptureError(OperatorError):
    """Captured residuals are missing, not finite, or those of other prompts."""

    code = "capture_error"


class UnsupportedArchitecture(OperatorError):
    """The model's class is not in the plugin's table of architectures."""

    code = "unsupported_architecture"


class UnsupportedConfiguration(OperatorError):
    """A vLLM option that steering has not been proved to work with."""

    code = "unsupported_configuration"


class KeyFileError(OperatorError):
    """The file of API keys cannot be read, or must not be trusted."""

    code = "key_file"


class AuditUnavailable(OperatorError):
    """What must be on record before it is done cannot be written down."""

    code = "audit_unavailable"


class PluginNotArmed(OperatorError):
    """A worker does not report the plugin version, layers or bundles that the server needs."""

    code = "plugin_not_armed"


class EngineError(TrimtabError):
    """A request failed inside the engine."""

    code = "engine_error"


class EditNotApplied(EngineError):
    """The engine did not confirm the edit of a steered request, so its answer is withheld.

    Attributes:
        reason: by which it is counted; here what the engine said is not what the plan allows.
    """

    code = "steering_not_applied"
    reason: ClassVar[str] = "contradicted"


class EditNotConfirmed(EditNotApplied):
    """The engine did not say in time what it did."""

    reason = "unconfirmed"


class EditFailed(EditNotApplied):
    """The engine said that it could not do what was asked."""

    reason = "failed"


class CapacityExceeded(EngineError):
    """No row or bank slot is left."""

    code = "steering_capacity"


class EngineOverloaded(EngineError):
    """The queue is full or the server is draining."""

    code = "server_is_overloaded"


class EngineTimeout(EngineError):
    """The engine did not give the first token, the next token or the whole answer in time."""

    code = "engine_timeout"


class EngineDied(EngineError):
    """The engine process is gone."""

    code = "engine_dead"
