"""Options of the plugin: which bundles, how many terms, how many rows, what is captured.

They travel to every engine process in `VllmConfig.additional_config["trimtab"]`, which also puts them into vLLM's
compile-cache key. Knows nothing of tensors or requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steering import __version__
from steering.bundle import Bundle, load_bundle
from steering.engine.bank import terms_needed
from steering.errors import BundleDigestError, UnsupportedConfiguration
from steering.terms import layers_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "trimtab"
WORKER_CLASS = "steering.engine.worker.SteeringWorker"
SCHEDULER_CLASS = "steering.engine.prefix_cache.make_scheduler"
DEFAULT_TERMS_PER_LAYER = 128
"""Terms a layer's table holds at least: steered layers × terms × (2·D + 8) × 4 bytes, 134 MB for 32 layers of width
4096. Bundles that need more get more."""


CAPTURE_FOLDER_VARIABLE = "TRIMTAB_CAPTURE_FOLDER"
"""Environment variable that names the folder of captured residuals. Set by whoever starts the engine, as an engine
option would change vLLM's compile-cache key with every folder."""

SHARD_BYTES = 96 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSettings:
    """What an engine captures of requests that ask for it.

    Attributes:
        folder: for the shards; one that holds some is gone on with.
        layers: decoder blocks whose outputs are kept, before their own edits; None for all.
        generated: first generated tokens kept beside the last prompt token, at most. A token's residual comes into
            being when the token is fed back, so an answer of n tokens has n - 1 of them.
        shard_bytes: most bytes of residuals in one shard; making one takes about twice that.
    """

    folder: Path
    layers: tuple[int, ...] | None = None
    generated: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise UnsupportedConfiguration(f"capture needs different layers in ascending order, got {self.layers}")
        if self.generated < 0 or self.shard_bytes < 1:
            raise UnsupportedConfiguration(
                f"capture needs generated >= 0 and shard_bytes >= 1, got {self.generated} and {self.shard_bytes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringOptions:
    """What one engine process needs to know before the model is built.

    Attributes:
        bundles: checked bundles, in the order given.
        terms_per_layer: capacity of each steered layer's table.
        capture: what is captured; None where nothing can be.
        is_checking_finite: the residuals of requests with a row are checked at every step.
        armed: decoder blocks that carry the op whatever these bundles need, for those loaded later.
        is_reporting: what was done to a request is told with its tokens.
    """

    bundles: tuple[Bundle, ...]
    terms_per_layer: int
    capture: CaptureSettings | None = None
    armed: tuple[int, ...] = ()
    is_checking_finite: bool = False
    is_reporting: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder blocks that carry the op: those some edit touches or some gate reads, and those armed."""
        edited = layers_of(edit for bundle in self.bundles for edit in bundle.edits.values())
        read = {probe.layer for bundle in self.bundles for probe in bundle.probes.values()}
        return tuple(sorted({*edited, *read, *self.armed}))


def engine_arguments(
    bundles: Sequence[Path],
    *,
    terms_per_layer: int | None = None,
    capture: CaptureSettings | None = None,
    layers: Sequence[int] | Literal["all"] = (),
    check_finite: bool = False,
    is_reporting: bool = False,
) -> dict[str, Any]:
    """Values for vLLM's `AsyncEngineArgs` that make an engine steer with these bundles.

    Args:
        bundles: folders; there may be none in an engine that captures.
        terms_per_layer: capacity of each steered layer's table; by default what the bundles need, and the default of
            this module at least.
        capture: what is captured; whoever starts the engine names the folder in the environment as well.
        layers: decoder blocks that carry the op beside those these bundles need, so that bundles that need them can be
            loaded later; an idle op costs little, and not nothing.
        check_finite: a steered request whose residuals become infinite or no numbers is ended with an error.
        is_reporting: what was done to a request is told with its tokens, to whoever calls `outcomes.listen`; in answers
            of plain `vllm serve`, where nobody does, it would be found as `kv_transfer_params`.

    Raises:
        BundleError: a bundle does not pass its checks.
    """
    loaded = [load_bundle(path) for path in bundles]
    described = [
        {"path": str(path.resolve()), "digest": bundle.digest} for path, bundle in zip(bundles, loaded, strict=True)
    ]
    options: dict[str, Any] = {"bundles": described}
    if terms_per_layer:
        options["terms_per_layer"] = terms_per_layer
    if check_finite:
        options["check_finite"] = True
    if is_reporting:
        options["reports"] = True
    if layers:
        options["layers"] = "all" if layers == "all" else sorted(set(layers))
    if capture is not None:
        kept = None if capture.layers is None else list(capture.layers)
        options["capture"] = {"layers": kept, "generated": capture.generated, "shard_bytes": capture.shard_bytes}
    return {
        "worker_cls": WORKER_CLASS,
        "scheduler_cls": SCHEDULER_CLASS,
        "additional_config": {CONFIG_KEY: options},
    }


def options_from(config: VllmConfig) -> SteeringOptions | None:
    """Read the options of this engine; None when it serves no bundle, captures nothing and is plain vLLM.

    Raises:
        UnsupportedConfiguration: unknown keys, or vLLM was not given the worker and scheduler that steering needs.
        BundleError: a bundle does not pass its checks, or is not the one the options name by digest.
    """
    additional = config.additional_config
    given = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    if not given:
        return None
    unknown = set(given) - {"bundles", "terms_per_layer", "capture", "version", "layers", "check_finite", "reports"}
    if unknown:
        raise UnsupportedConfiguration(f"unknown keys {sorted(unknown)} in additional_config[{CONFIG_KEY!r}]")
    for option, value, needed in (
        ("worker_cls", config.parallel_config.worker_cls, WORKER_CLASS),
        ("scheduler_cls", config.scheduler_config.scheduler_cls, SCHEDULER_CLASS),
    ):
        if value != needed:
            raise UnsupportedConfiguration(f"steering needs {option}={needed!r}, this engine has {value!r}")
    capture = None if given.get("capture") is None else _capture_from(given["capture"])
    armed = _armed_from(given.get("layers", []), config)
    entries = given.get("bundles", [] if capture or armed else None)
    if not isinstance(entries, list) or not (entries or capture or armed):
        raise UnsupportedConfiguration(f"additional_config[{CONFIG_KEY!r}] needs a list of bundles, got {entries!r}")
    bundles = []
    for entry in entries:
        path, digest = (entry, None) if isinstance(entry, str) else (entry["path"], entry.get("digest"))
        bundle = load_bundle(Path(path))
        if digest is not None and bundle.digest != digest:
            raise BundleDigestError(f"bundle {path} has digest {bundle.digest}, the engine was started with {digest}")
        bundles.append(bundle)
    terms = given.get("terms_per_layer") or max(DEFAULT_TERMS_PER_LAYER, terms_needed(bundles))
    for name in ("check_finite", "reports"):
        if not isinstance(given.get(name, False), bool):
            raise UnsupportedConfiguration(
                f"additional_config[{CONFIG_KEY!r}][{name!r}] is true or false, got {given[name]!r}"
            )
    return SteeringOptions(
        bundles=tuple(bundles),
        terms_per_layer=int(terms),
        capture=capture,
        armed=armed,
        is_checking_finite=given.get("check_finite", False),
        is_reporting=given.get("reports", False),
    )


def _armed_from(given: object, config: VllmConfig) -> tuple[int, ...]:
    total: int = config.model_config.get_total_num_hidden_layers() if given else 0
    if given == "all":
        return tuple(range(total))
    if not isinstance(given, list) or not all(type(layer) is int and 0 <= layer < total for layer in given):
        raise UnsupportedConfiguration(
            f"additional_config[{CONFIG_KEY!r}]['layers'] is \"all\" or a list of numbers from 0 to {total - 1}, the "
            f"model's decoder blocks; got {given!r}"
        )
    return tuple(sorted(set(given)))


def _capture_from(given: object) -> CaptureSettings:
    where = f"additional_config[{CONFIG_KEY!r}]['capture']"
    known = {"layers", "generated", "shard_bytes"}
    if not isinstance(given, Mapping) or set(given) - known:
        raise UnsupportedConfiguration(f"{where} is an object with the keys {sorted(known)}, got {given!r}")
    numbers = {name: given[name] for name in ("generated", "shard_bytes") if name in given}
    layers = given.get("layers")
    flat = [*numbers.values(), *(layers if isinstance(layers, list) else [])]
    if not all(type(number) is int for number in flat) or not (layers is None or isinstance(layers, list)):
        raise UnsupportedConfiguration(f"{where} needs whole numbers, and a list of layers or null, got {given!r}")
    folder = os.environ.get(CAPTURE_FOLDER_VARIABLE)
    if not folder:
        raise UnsupportedConfiguration(
            f"capture needs a folder: set the environment variable {CAPTURE_FOLDER_VARIABLE} where the engine starts"
        )
    return CaptureSettings(folder=Path(folder), layers=None if layers is None else tuple(layers), **numbers)


def enter_compile_key(config: VllmConfig, options: SteeringOptions) -> None:
    """Put the plugin's version and layer set where `VllmConfig.compute_hash` reads them (design rule 6).

    A compiled graph is only reused where the same layers carry the same op; otherwise a stale cache would serve a graph
    without it, unsteered and without an error.
    """
    assert isinstance(config.additional_config, dict)
    # What is captured stands there as it was given. Read again, these layers are armed ones, and come to the same.
    config.additional_config[CONFIG_KEY] |= {"version": __version__, "layers": list(options.layers)}
