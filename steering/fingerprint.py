"""Fingerprint of a model: what a bundle is bound to.

Read from the files of a local model folder alone. Knows nothing of transformers, vLLM or HTTP.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from steering.errors import FingerprintMismatch, OperatorError

SAMPLE_BYTES = 64 * 1024
"""How much of the start, the middle and the end of each weight file enters the weight digest."""

_VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


class Fingerprint(BaseModel):
    """What identifies a model for a bundle; digests are `sha256:` and 64 hexadecimal digits.

    Attributes:
        architecture: class name in `config.json`, such as `LlamaForCausalLM`.
        hidden_size: width of the residual stream.
        layers: number of decoder blocks.
        vocabulary: rows of the embedding.
        config_digest: of `config.json` without keys that do not change the function.
        weights_digest: of the names and sizes of the weight files and samples of their bytes.
        tokenizer_digest: of `tokenizer.json`.
        chat_template_digest: of the chat template's text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    architecture: str
    hidden_size: int
    layers: int
    vocabulary: int
    config_digest: str
    weights_digest: str
    tokenizer_digest: str
    chat_template_digest: str

    def check(self, found: Fingerprint, *, bundle: str, accept_transfer: bool = False) -> bool:
        """Compare the fingerprint a bundle needs (self) with that of the model at hand.

        Args:
            found: fingerprint of the model that is to be steered.
            bundle: name for the message.
            accept_transfer: a same-shape model with other weights, tokenizer or template is accepted.

        Returns:
            True when the model is the bundle's own, False when the bundle is transferred.

        Raises:
            FingerprintMismatch: names every field that differs, the value found and the value needed.
        """
        needed, given = self.model_dump(), found.model_dump()
        differing = {name for name in needed if needed[name] != given[name]}
        if not differing:
            return True
        shape_differs = differing & {"architecture", "hidden_size", "layers"}
        if accept_transfer and not shape_differs:
            return False
        facts = "; ".join(f"{name}: found {given[name]}, needs {needed[name]}" for name in sorted(differing))
        advice = (
            "fit a bundle for this model with `trimtab fit`"
            if shape_differs
            else "fit a bundle for this model, or accept an unmeasured transfer explicitly with --accept-transfer"
        )
        raise FingerprintMismatch(f"bundle {bundle!r} was made for another model ({facts}); {advice}")


def fingerprint_of(model: Path) -> Fingerprint:
    """Fingerprint the model in a local folder (config.json, *.safetensors, tokenizer.json, chat template).

    Raises:
        OperatorError: the folder or its config.json is missing or unreadable.
    """
    config = _read_json(model / "config.json")
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text_config, dict)
    try:
        return Fingerprint(
            architecture=str(config["architectures"][0]),
            hidden_size=int(text_config["hidden_size"]),
            layers=int(text_config["num_hidden_layers"]),
            vocabulary=int(text_config["vocab_size"]),
            config_digest=digest_of(_canonical(config)),
            weights_digest=_weights_digest(model),
            tokenizer_digest=_file_digest(model / "tokenizer.json"),
            chat_template_digest=digest_of(_chat_template(model).encode()),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise OperatorError(f"{model / 'config.json'} lacks {error}, needed to fingerprint the model") from error


def digest_of(payload: bytes) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(payload).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OperatorError(f"cannot read {path}: {error}; give a local model folder") from error
    if not isinstance(content, dict):
        raise OperatorError(f"{path} must hold a JSON object")
    return content


def _canonical(config: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _file_digest(path: Path) -> str:
    return digest_of(path.read_bytes()) if path.is_file() else "absent"


def _chat_template(model: Path) -> str:
    separate = model / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    config = model / "tokenizer_config.json"
    if config.is_file():
        return str(_read_json(config).get("chat_template") or "")
    return ""


def _weights_digest(model: Path) -> str:
    """Sampled, so that an 80B model takes a second; a full check is what a signature is for."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        return "absent"
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            for offset in (0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return "sha256:" + digest.hexdigest()
