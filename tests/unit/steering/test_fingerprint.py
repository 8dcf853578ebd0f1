"""Fingerprint: every change of the model a bundle is bound to is noticed, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steering.errors import FingerprintMismatch, OperatorError
from steering.fingerprint import SAMPLE_BYTES, Fingerprint, fingerprint_of
from tests.samples import fingerprint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
    "transformers_version": "5.0",
}
SHAPE = ("architecture", "hidden_size", "layers")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with every file a fingerprint reads."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"weight": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return tmp_path


def rewrite_config(**changed: object) -> Callable[[Path], None]:
    """A change of `config.json`."""
    return lambda model: (model / "config.json").write_text(json.dumps(CONFIG | changed)) and None


def flip_byte(model: Path, at: int) -> None:
    """Change one byte of the weights."""
    path = model / "model.safetensors"
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (rewrite_config(architectures=["MistralForCausalLM"]), {"architecture", "config_digest"}),
        (rewrite_config(hidden_size=32), {"hidden_size", "config_digest"}),
        (rewrite_config(num_hidden_layers=5), {"layers", "config_digest"}),
        (rewrite_config(vocab_size=65), {"vocabulary", "config_digest"}),
        (rewrite_config(rope_theta=5e5), {"config_digest"}),
        (lambda model: flip_byte(model, -1), {"weights_digest"}),
        (lambda model: save_file({"weight": torch.arange(1001.0)}, model / "model.safetensors"), {"weights_digest"}),
        (lambda model: (model / "model.safetensors").rename(model / "other.safetensors"), {"weights_digest"}),
        (lambda model: (model / "tokenizer.json").write_text('{"a": 1}'), {"tokenizer_digest"}),
        (lambda model: (model / "tokenizer.json").unlink(), {"tokenizer_digest"}),
        (lambda model: (model / "chat_template.jinja").write_text("{{ other }}"), {"chat_template_digest"}),
        (lambda model: (model / "tokenizer_config.json").unlink(), {"chat_template_digest"}),
    ],
)
def test_each_change_of_the_files_changes_its_field_and_no_other(
    model: Path, change: Callable[[Path], None], fields: set[str]
) -> None:
    """Architecture, shape, configuration, weights, tokenizer and template each have a field that notices."""
    before = fingerprint_of(model).model_dump()
    change(model)
    after = fingerprint_of(model).model_dump()
    assert {name for name in before if before[name] != after[name]} == fields


@pytest.mark.parametrize("changed", [{"dtype": "float32"}, {"transformers_version": "6"}, {"use_cache": False}])
def test_keys_that_do_not_change_the_function_are_ignored(model: Path, changed: dict[str, object]) -> None:
    """Saving the same model with another library version or dtype entry keeps its fingerprint."""
    before = fingerprint_of(model)
    rewrite_config(**changed)(model)
    assert fingerprint_of(model) == before


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_weights_are_sampled_at_start_middle_and_end(model: Path, place: str) -> None:
    """A file larger than the samples is noticed to differ in each of the three."""
    save_file({"weight": torch.zeros(SAMPLE_BYTES)}, model / "model.safetensors")
    size = (model / "model.safetensors").stat().st_size
    before = fingerprint_of(model).weights_digest
    flip_byte(model, {"start": 200, "middle": size // 2, "end": size - 1}[place])
    assert fingerprint_of(model).weights_digest != before


def test_a_separate_template_file_wins_over_the_tokenizer_configuration(model: Path) -> None:
    """As transformers reads them: the same text in either place is the same template."""
    before = fingerprint_of(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "ignored"}))
    assert fingerprint_of(model) == before


def test_nested_text_configuration_gives_the_shape(model: Path) -> None:
    """Models with a vision half keep the decoder's shape in `text_config`."""
    nested = {"hidden_size": 24, "num_hidden_layers": 3, "vocab_size": 9}
    rewrite_config(architectures=["Gemma3ForConditionalGeneration"], text_config=nested)(model)
    found = fingerprint_of(model)
    assert (found.hidden_size, found.layers, found.vocabulary) == (24, 3, 9)


@pytest.mark.parametrize("missing", ["architectures", "hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_configuration_without_a_needed_key_is_refused(model: Path, missing: str) -> None:
    """The operator is told the file and the key."""
    (model / "config.json").write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != missing}))
    with pytest.raises(OperatorError, match=rf"config\.json.*{missing}"):
        fingerprint_of(model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": [], "hidden_size": 1}', '{"architectures": null}'])
def test_an_unreadable_configuration_is_refused(model: Path, text: str) -> None:
    """Whatever stands in config.json, the error is the operator's and names the file."""
    (model / "config.json").write_text(text)
    with pytest.raises(OperatorError, match=r"config\.json"):
        fingerprint_of(model)


def test_a_size_that_is_no_number_is_refused(model: Path) -> None:
    """A word where a number belongs is the operator's error, too."""
    rewrite_config(hidden_size="wide")(model)
    with pytest.raises(OperatorError, match=r"config\.json"):
        fingerprint_of(model)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """A hub name given for a folder says that a local folder is needed."""
    with pytest.raises(OperatorError, match="local model folder"):
        fingerprint_of(tmp_path / "absent")


def test_the_models_own_bundle_is_not_a_transfer() -> None:
    """Equal fingerprints are accepted, and reported as the bundle's own, with or without permission to transfer."""
    assert fingerprint().check(fingerprint(), bundle="b") is True
    assert fingerprint().check(fingerprint(), bundle="b", accept_transfer=True) is True


@pytest.mark.parametrize("field", sorted(Fingerprint.model_fields))
def test_any_differing_field_is_refused_and_named_with_both_values(field: str) -> None:
    """Without permission to transfer one field is enough; the message has what was found and what is needed."""
    other = 99 if isinstance(getattr(fingerprint(), field), int) else "other"
    needed = getattr(fingerprint(), field)
    with pytest.raises(FingerprintMismatch, match=f"{field}: found {other}, needs {needed}"):
        fingerprint().check(fingerprint(**{field: other}), bundle="b")


@pytest.mark.parametrize("field", sorted(Fingerprint.model_fields))
def test_a_transfer_needs_equal_shape(field: str) -> None:
    """Permission to transfer covers other weights, tokenizer and template, never another architecture or shape."""
    other = fingerprint(**{field: 99 if isinstance(getattr(fingerprint(), field), int) else "other"})
    if field in SHAPE:
        with pytest.raises(FingerprintMismatch, match=rf"{field}.*trimtab fit"):
            fingerprint().check(other, bundle="b", accept_transfer=True)
    else:
        assert fingerprint().check(other, bundle="b", accept_transfer=True) is False


def test_every_differing_field_is_named_at_once() -> None:
    """The operator sees the whole difference, not its first part."""
    with pytest.raises(FingerprintMismatch, match=r"config_digest.*tokenizer_digest"):
        fingerprint().check(fingerprint(tokenizer_digest="t", config_digest="c"), bundle="b")
