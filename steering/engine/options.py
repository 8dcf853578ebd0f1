"""Options of the plugin: which bundles, how many terms, how many rows.

They travel to every engine process in `VllmConfig.additional_config["trimtab"]`, which also puts them into vLLM's
compile-cache key. Knows nothing of tensors or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringOptions:
    """What one engine process needs to know before the model is built.

    Attributes:
        bundles: checked bundles, in the order given.
        terms_per_layer: capacity of each steered layer's table.
    """

    bundles: tuple[Bundle, ...]
    terms_per_layer: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder blocks that carry the op: those some edit touches or some gate reads."""
        edited = layers_of(edit for bundle in self.bundles for edit in bundle.edits.values())
        read = {probe.layer for bundle in self.bundles for probe in bundle.probes.values()}
        return tuple(sorted({*edited, *read}))


def engine_arguments(bundles: Sequence[Path], *, terms_per_layer: int | None = None) -> dict[str, Any]:
    """Values for vLLM's `AsyncEngineArgs` that make an engine steer with these bundles.

    Args:
        bundles: folders.
        terms_per_layer: capacity of each steered layer's table; by default what the bundles need, and the default of
            this module at least.

    Raises:
        BundleError: a bundle does not pass its checks.
    """
    loaded = [load_bundle(path) for path in bundles]
    described = [
        {"path": str(path.resolve()), "digest": bundle.digest} for path, bundle in zip(bundles, loaded, strict=True)
    ]
    return {
        "worker_cls": WORKER_CLASS,
        "scheduler_cls": SCHEDULER_CLASS,
        "additional_config": {
            CONFIG_KEY: {"bundles": described, **({"terms_per_layer": terms_per_layer} if terms_per_layer else {})}
        },
    }


def options_from(config: VllmConfig) -> SteeringOptions | None:
    """Read the options of this engine; None when it serves no bundle and is plain vLLM.

    Raises:
        UnsupportedConfiguration: unknown keys, or vLLM was not given the worker and scheduler that steering needs.
        BundleError: a bundle does not pass its checks, or is not the one the options name by digest.
    """
    additional = config.additional_config
    given = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    if not given:
        return None
    unknown = set(given) - {"bundles", "terms_per_layer", "version", "layers"}
    if unknown:
        raise UnsupportedConfiguration(f"unknown keys {sorted(unknown)} in additional_config[{CONFIG_KEY!r}]")
    for option, value, needed in (
        ("worker_cls", config.parallel_config.worker_cls, WORKER_CLASS),
        ("scheduler_cls", config.scheduler_config.scheduler_cls, SCHEDULER_CLASS),
    ):
        if value != needed:
            raise UnsupportedConfiguration(f"steering needs {option}={needed!r}, this engine has {value!r}")
    entries = given.get("bundles")
    if not isinstance(entries, list) or not entries:
        raise UnsupportedConfiguration(f"additional_config[{CONFIG_KEY!r}] needs a list of bundles, got {entries!r}")
    bundles = []
    for entry in entries:
        path, digest = (entry, None) if isinstance(entry, str) else (entry["path"], entry.get("digest"))
        bundle = load_bundle(Path(path))
        if digest is not None and bundle.digest != digest:
            raise BundleDigestError(f"bundle {path} has digest {bundle.digest}, the engine was started with {digest}")
        bundles.append(bundle)
    terms = given.get("terms_per_layer") or max(DEFAULT_TERMS_PER_LAYER, terms_needed(bundles))
    return SteeringOptions(bundles=tuple(bundles), terms_per_layer=int(terms))


def enter_compile_key(config: VllmConfig, options: SteeringOptions) -> None:
    """Put the plugin's version and layer set where `VllmConfig.compute_hash` reads them (design rule 6).

    A compiled graph is only reused where the same layers carry the same op; otherwise a stale cache would serve a graph
    without it, unsteered and without an error.
    """
    assert isinstance(config.additional_config, dict)
    config.additional_config[CONFIG_KEY] |= {"version": __version__, "layers": list(options.layers)}
