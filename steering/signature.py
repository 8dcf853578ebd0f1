"""Signature: who made a bundle, by a file `signature` beside its manifest.

The format is that of `model-signing` (OpenSSF): a list of the digests of all other files, signed with a key on an
elliptic curve, so that `model_signing verify key` checks it too. The bundle's digest does not depend on it. Knows
nothing of vLLM, transformers or HTTP; model-signing is imported where it is needed.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steering.bundle import MANIFEST, TENSORS, Bundle
from steering.errors import BundleSignatureError

SIGNATURE = "signature"
MAX_BYTES = 4 * 1024 * 1024


def sign_bundle(bundle: Bundle, private_key: Path) -> Path:
    """Sign a bundle as it lies on disk; returns the file of the signature, which replaces one that is there.

    Args:
        bundle: that was just loaded from its folder, and so is valid.
        private_key: PEM file of a key on the curve P-256, P-384 or P-521, without a password.

    Raises:
        BundleSignatureError: the key cannot be used, or the folder holds what cannot be signed.
    """
    from model_signing import hashing, signing

    path = _folder(bundle)
    # Written elsewhere first: nothing of an earlier signature may enter this one, nor half of one be left.
    with _explained(f"cannot sign {path} with {private_key}"), tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / SIGNATURE
        files = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
        config = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(files)
        config.sign(path, written)
        signature = written.read_bytes()
        target = path / SIGNATURE
        unfinished = path / f"{SIGNATURE}.unfinished"
        unfinished.write_bytes(signature)
        return unfinished.replace(target)


def check_signature(bundle: Bundle, public_key: Path) -> None:
    """Refuse a bundle that is not signed with this key, or of which a file has changed, come or gone since.

    What was signed is compared with what was loaded, not only with what lies on disk now.

    Args:
        bundle: as it was loaded from its folder.
        public_key: PEM file.

    Raises:
        BundleSignatureError: says what is wrong with it.
    """
    from model_signing import hashing, verifying

    path = _folder(bundle)
    signature = _read(path / SIGNATURE, bundle.label)
    with _explained(f"bundle {bundle.label} in {path} is not as the owner of {public_key} signed it"):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / SIGNATURE  # read once, so that what is checked is what is believed below
            copy.write_bytes(signature)
            files = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(files)
            config.verify(path, copy)
        signed = _signed_digests(signature)
    loaded = {MANIFEST: bundle.digest, TENSORS: bundle.manifest.tensors_digest}
    for name, digest in loaded.items():
        if f"sha256:{signed.get(name)}" != digest:
            raise BundleSignatureError(
                f"bundle {bundle.label} in {path}: {name} was loaded with digest {digest}, and "
                f"{signed.get(name, 'nothing')} is signed"
            )


def _folder(bundle: Bundle) -> Path:
    if bundle.path is None:
        raise BundleSignatureError(f"bundle {bundle.label} is in no folder, and a signature is of files")
    return bundle.path


def _read(path: Path, label: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BundleSignatureError(
            f"bundle {label} has no signature in {path}: {error.strerror}; see `trimtab bundle sign`"
        ) from error
    if len(content) > MAX_BYTES:
        raise BundleSignatureError(f"{path} has more than {MAX_BYTES} bytes, which no signature of a bundle needs")
    return content


def _signed_digests(signature: bytes) -> dict[str, str]:
    """SHA-256 by file name of a signature that was verified: in-toto's statement in a DSSE envelope."""
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    files = statement["predicate"]["resources"]
    return {file["name"]: file["digest"] for file in files if file["algorithm"] == "sha256"}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Model-signing raises whatever its parsers do, for keys and signatures that are none as well."""
    try:
        yield
    except BundleSignatureError:
        raise
    except Exception as error:
        raise BundleSignatureError(f"{what}: {str(error) or type(error).__name__}") from error
