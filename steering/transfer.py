"""Transfer: a bundle's profiles carried over to another model of the same shape, unchanged and said so (P1.6).

Edits, probes and thresholds stay as they were measured on the model they come from; nothing is measured here. The
target's own refusal tokens, where it has any, are not assumed to mean what the original's did; a response probe stays
behind, since it is right about its own model's answers alone. Knows nothing of vLLM, transformers or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering.bundle import Bundle, save_bundle
from steering.errors import BundleFormatError, FingerprintMismatch, OperatorError, UnknownName
from steering.fingerprint import Fingerprint, fingerprint_of
from steering.manifest import Manifest, Profile, Transfer
from steering.plan import CategorySource

DEFAULT_PROFILES = ("low-rank",)
"""P1 transfers the learned vector alone: the categorical edits are chosen by refusal tokens, which targets lack."""

ACCEPTANCE = (
    "its probes, thresholds and doses were measured on another model, and nothing says how often they are wrong on "
    "this one: measure it with `trimtab eval` before relying on it. Accept that with --accept-transfer"
)
CARD = "CARD.md"


def transfer(
    source: Bundle,
    target: Path,
    out: Path,
    *,
    profiles: Sequence[str] = (),
    is_accepted: bool = False,
    keeps_refusal_tokens: bool = False,
) -> Bundle:
    """Write a bundle for `target` of some profiles of `source`, and of what they need.

    Args:
        source: checked bundle.
        target: local model folder.
        out: the new bundle's folder; must not hold a bundle yet.
        profiles: names; empty for `DEFAULT_PROFILES`.
        is_accepted: the operator accepts that nothing of it was measured on the target.
        keeps_refusal_tokens: the target names categories by the same tokens, with the same ids.

    Raises:
        FingerprintMismatch: another architecture, width or number of layers; or not accepted.
        UnknownName: a profile that the source does not have.
        OperatorError: the source was made for the target, `out` holds a bundle, the target lacks a token that is to be
            kept, or a profile reads tokens that are not.
    """
    manifest, found = source.manifest, fingerprint_of(target)
    _check_target(manifest, found, target, is_accepted=is_accepted)
    if (out / "manifest.json").exists():
        raise OperatorError(f"{out} holds a bundle already; name another folder with --out")
    chosen = _chosen(manifest, tuple(profiles) or DEFAULT_PROFILES)
    if keeps_refusal_tokens:
        _check_tokens(manifest, target)
    else:
        _check_token_readers(chosen)
    edit_names = {name for profile in chosen for name in (*profile.refuse.values(), *profile.comply.values())}
    probe_names = {profile.gate.probe for profile in chosen if profile.gate is not None}
    # A bundle that was transferred before still tells of the model that it was measured on.
    origin = manifest.transfer or Transfer(bundle=f"{manifest.name}@{source.digest}", model=manifest.model)
    fields = manifest.model_dump(mode="json")
    kept = {
        "name": f"{manifest.name}-transferred" if manifest.transfer is None else manifest.name,
        "model": found.model_dump(),
        "categories": [category | _token(category, keeps=keeps_refusal_tokens) for category in fields["categories"]],
        "respond": fields["respond"] if keeps_refusal_tokens else None,
        "response_probe": None,
        "probes": [record for record in fields["probes"] if record["name"] in probe_names],
        "edits": [record for record in fields["edits"] if record["name"] in edit_names],
        "profiles": [profile.model_dump(mode="json") for profile in chosen],
        "default_profile": _default(manifest, chosen),
        "transfer": origin.model_dump(mode="json"),
    }
    del fields["tensors_digest"]
    bundle = save_bundle(
        out,
        fields | kept,
        {name: source.edits[name] for name in edit_names},
        {name: source.probes[name] for name in probe_names},
    )
    (out / CARD).write_text(_card(bundle, origin), encoding="utf-8")
    return bundle


def _check_target(manifest: Manifest, found: Fingerprint, target: Path, *, is_accepted: bool) -> None:
    if manifest.model.check(found, bundle=manifest.name, accept_transfer=True):
        raise OperatorError(
            f"bundle {manifest.name!r} was made for the model in {target}: there is nothing to transfer"
        )
    if not is_accepted:
        raise FingerprintMismatch(f"bundle {manifest.name!r} was not made for the model in {target}: {ACCEPTANCE}")


def _chosen(manifest: Manifest, names: Sequence[str]) -> list[Profile]:
    known = [profile.name for profile in manifest.profiles]
    strange = sorted(set(names) - set(known))
    if strange:
        raise UnknownName(
            f"bundle {manifest.name!r} has no profiles {strange}; choose with --profile among {known}",
            parameter="profile",
        )
    return [profile for profile in manifest.profiles if profile.name in names]


def _check_tokens(manifest: Manifest, target: Path) -> None:
    """The target's tokenizer must have every token of the source, under the same id."""
    from tokenizers import Tokenizer

    path = target / "tokenizer.json"
    if not path.is_file():
        raise OperatorError(f"{path} is missing, so that nothing is known of the target's tokens")
    tokenizer = Tokenizer.from_file(str(path))
    named = [(category.token, category.token_id) for category in manifest.categories]
    if manifest.respond is not None:
        named.append((manifest.respond.token, manifest.respond.token_id))
    wrong = [
        f"{token!r}: found id {tokenizer.token_to_id(token)}, needs {needed}"
        for token, needed in named
        if token is not None and tokenizer.token_to_id(token) != needed
    ]
    if wrong:
        raise OperatorError(
            f"the tokenizer of {target} does not have the refusal tokens of bundle {manifest.name!r} "
            f"({'; '.join(wrong)}); transfer without --keep-refusal-tokens"
        )


def _check_token_readers(chosen: Sequence[Profile]) -> None:
    readers = [
        profile.name
        for profile in chosen
        if profile.gate is not None and profile.gate.category_source is CategorySource.REFUSAL_TOKENS
    ]
    if readers:
        raise BundleFormatError(
            f"profiles {readers} read the model's refusal tokens, which are not transferred; leave them out, or keep "
            "the tokens with --keep-refusal-tokens where the target has them"
        )


def _token(category: dict[str, Any], *, keeps: bool) -> dict[str, Any]:
    return {} if keeps else dict.fromkeys(set(category) - {"name"})


def _default(manifest: Manifest, chosen: Sequence[Profile]) -> str:
    names = [profile.name for profile in chosen]
    return manifest.default_profile if manifest.default_profile in names else names[0]


def _card(bundle: Bundle, origin: Transfer) -> str:
    manifest = bundle.manifest
    profiles = ", ".join(f"`{profile.name}`" for profile in manifest.profiles)
    return (
        f"# {manifest.name}\n\n"
        f"Profiles {profiles}, transferred unchanged from bundle `{origin.bundle}`.\n\n"
        f"Measured on: {origin.model.architecture}, {origin.model.layers} layers of width {origin.model.hidden_size}, "
        f"weights `{origin.model.weights_digest}`.\n"
        f"Used on: {manifest.model.architecture}, {manifest.model.layers} layers of width "
        f"{manifest.model.hidden_size}, weights `{manifest.model.weights_digest}`.\n\n"
        "Edits, probes, thresholds, operating points and certified strengths are those of the original; none of them "
        'was measured on this model. Every answer says `"transferred": true`.\n'
    )
