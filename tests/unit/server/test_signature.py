"""Signed bundles: what is accepted where a signature is required, and everything that is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from server.cli import app
from server.process import bundle_check, load_catalog
from server.settings import Settings
from steering.bundle import Bundle, load_bundle
from steering.errors import BundleSignatureError, UnsupportedConfiguration
from steering.signature import SIGNATURE, check_signature, sign_bundle
from tests.samples import bundle_in_memory, fingerprint, random_edit, write_bundle

PRIVATE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
PUBLIC = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `ours` and `theirs`, each a pair of PEM files."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{name}.pem").write_bytes(key.private_bytes(*PRIVATE))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*PUBLIC))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of one edit, not signed."""
    made = write_bundle(tmp_path / "bundle", {"refuse": random_edit("refuse", ranks={1: 1})})
    (tmp_path / "bundle" / "CARD.md").write_text("A bundle.\n")
    return made


def folder_of(bundle: Bundle) -> Path:
    """Where it lies."""
    assert bundle.path is not None
    return bundle.path


def test_what_is_signed_is_accepted_and_keeps_its_digest(bundle: Bundle, keys: Path, tmp_path: Path) -> None:
    """Again after a second signature, and after the folder was moved or copied; the bundle is the same bundle."""
    for _ in range(2):
        assert sign_bundle(bundle, keys / "ours.pem") == folder_of(bundle) / SIGNATURE
        signed = load_bundle(folder_of(bundle))
        assert signed.digest == bundle.digest
        check_signature(signed, keys / "ours.pub")
    moved = shutil.copytree(folder_of(bundle), tmp_path / "elsewhere")
    check_signature(load_bundle(moved), keys / "ours.pub")


def test_the_signature_is_one_that_others_can_check(bundle: Bundle, keys: Path) -> None:
    """model-signing's own command agrees, and with this one about a change."""
    sign_bundle(bundle, keys / "ours.pem")
    folder = folder_of(bundle)
    command = [sys.executable, "-m", "model_signing", "verify", "key", folder, "--signature", folder / SIGNATURE]
    command += ["--public_key", keys / "ours.pub"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    (folder / "CARD.md").write_text("Another bundle.\n")
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1


def _other_tensors(folder: Path) -> None:
    """Another bundle in place of the one that was signed, valid in itself."""
    write_bundle(folder, {"refuse": random_edit("refuse", ranks={1: 1}, seed=7)})


CHANGES: dict[str, Callable[[Path], object]] = {
    "is not as the owner": lambda folder: (folder / "CARD.md").write_text("Trust me.\n"),
    "Extra files": lambda folder: (folder / "more.txt").write_text("x"),
    "Extra files.*.gitignore": lambda folder: (folder / ".gitignore").write_text("x"),
    "Missing files": lambda folder: (folder / "CARD.md").unlink(),
    "Hash mismatch": _other_tensors,
    "has no signature": lambda folder: (folder / SIGNATURE).unlink(),
    "signed it": lambda folder: (folder / SIGNATURE).write_text("{}"),
    "more than": lambda folder: (folder / SIGNATURE).write_bytes(b" " * (4 * 1024 * 1024 + 1)),
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_has_changed_since_is_refused(bundle: Bundle, keys: Path, told: str) -> None:
    """A file that changed, came or went, a signature that is gone, empty, or too large to be one."""
    folder = folder_of(bundle)
    sign_bundle(bundle, keys / "ours.pem")
    CHANGES[told](folder)
    with pytest.raises(BundleSignatureError, match=told):
        check_signature(load_bundle(folder), keys / "ours.pub")


def test_a_signature_of_someone_else_is_refused(bundle: Bundle, keys: Path) -> None:
    """And so is one of ours checked by a file that is no public key."""
    sign_bundle(bundle, keys / "theirs.pem")
    for name in ("ours.pub", "ours.pem", "nowhere.pub"):
        with pytest.raises(BundleSignatureError, match="is not as the owner of"):
            check_signature(load_bundle(folder_of(bundle)), keys / name)


def test_what_was_loaded_is_compared_with_what_is_signed(bundle: Bundle, keys: Path, tmp_path: Path) -> None:
    """Files that were put back after they were read do not pass for those in memory."""
    sign_bundle(bundle, keys / "ours.pem")
    kept = shutil.copytree(folder_of(bundle), tmp_path / "kept")
    _other_tensors(folder_of(bundle))
    loaded = load_bundle(folder_of(bundle))
    shutil.copytree(kept, folder_of(bundle), dirs_exist_ok=True)
    with pytest.raises(BundleSignatureError, match="was loaded with digest"):
        check_signature(loaded, keys / "ours.pub")


def test_what_cannot_be_signed_is_told(bundle: Bundle, keys: Path, tmp_path: Path) -> None:
    """A key that is none, one of another kind, a link in the folder, a bundle in no folder; nothing is left behind."""
    other = tmp_path / "rsa.pem"
    other.write_bytes(rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(*PRIVATE))
    for key in (keys / "ours.pub", keys / "nowhere.pem", other):
        with pytest.raises(BundleSignatureError, match="cannot sign"):
            sign_bundle(bundle, key)
    (folder_of(bundle) / "link").symlink_to(keys / "ours.pub")
    with pytest.raises(BundleSignatureError, match="cannot sign"):
        sign_bundle(bundle, keys / "ours.pem")
    with pytest.raises(BundleSignatureError, match="in no folder"):
        sign_bundle(bundle_in_memory({"refuse": random_edit("refuse", ranks={1: 1})}), keys / "ours.pem")
    assert not [entry for entry in folder_of(bundle).iterdir() if entry.name.startswith(SIGNATURE)]


def test_a_server_that_requires_signatures_loads_no_other_bundle(
    bundle: Bundle, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither at its start nor later; and it does not start on half of the setting."""
    monkeypatch.setattr("steering.fingerprint.fingerprint_of", lambda _: fingerprint())
    settings = Settings(require_signature=True, signature_key=keys / "ours.pub")
    check = bundle_check(tmp_path, settings)
    with pytest.raises(BundleSignatureError, match="has no signature"):
        load_catalog([folder_of(bundle)], check)
    sign_bundle(bundle, keys / "ours.pem")
    assert load_catalog([folder_of(bundle)], check).bundles[0].digest == bundle.digest
    for half in (Settings(require_signature=True), Settings(signature_key=keys / "ours.pub")):
        with pytest.raises(UnsupportedConfiguration, match="go together"):
            bundle_check(tmp_path, half)


def test_commands_sign_and_verify(bundle: Bundle, keys: Path) -> None:
    """`trimtab bundle sign` and `verify --signature-key`, with an error where the key is another."""
    folder = str(folder_of(bundle))
    signed = CliRunner().invoke(app, ["bundle", "sign", folder, "--key", str(keys / "ours.pem")])
    assert signed.exit_code == 0, signed.output
    verified = CliRunner().invoke(app, ["bundle", "verify", folder, "--signature-key", str(keys / "ours.pub")])
    assert "signed by the owner of" in verified.output
    refused = CliRunner().invoke(app, ["bundle", "verify", folder, "--signature-key", str(keys / "theirs.pub")])
    assert isinstance(refused.exception, BundleSignatureError)
