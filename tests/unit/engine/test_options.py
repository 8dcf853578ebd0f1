"""Options: what the gateway hands to vLLM is what every engine process reads back, or the engine does not start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steering import __version__
from steering.bundle import MANIFEST, load_bundle, save_bundle
from steering.engine.options import (
    CAPTURE_FOLDER_VARIABLE,
    CONFIG_KEY,
    DEFAULT_TERMS_PER_LAYER,
    SCHEDULER_CLASS,
    WORKER_CLASS,
    CaptureSettings,
    engine_arguments,
    enter_compile_key,
    options_from,
)
from steering.errors import BundleDigestError, BundleFormatError, UnsupportedConfiguration
from tests.samples import manifest_of, random_edit, write_bundle


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    """Two bundles that edit layers 1 and 3, and 0 and 1."""
    write_bundle(tmp_path / "one", {"a": random_edit("a", ranks={1: 1, 3: 2})})
    write_bundle(tmp_path / "two", {"b": random_edit("b", ranks={0: 1, 1: 1}, seed=1)})
    return [tmp_path / "one", tmp_path / "two"]


def config_of(arguments: dict[str, Any], **changed: Any) -> Any:
    """The parts of vLLM's configuration that engine arguments become."""
    given = arguments | changed
    return SimpleNamespace(
        additional_config=given["additional_config"],
        parallel_config=SimpleNamespace(worker_cls=given["worker_cls"]),
        scheduler_config=SimpleNamespace(scheduler_cls=given["scheduler_cls"]),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 6),
    )


def test_engine_processes_read_what_the_gateway_gave(bundles: list[Path]) -> None:
    """The same bundles in the same order, the union of their layers, the same capacity."""
    options = options_from(config_of(engine_arguments(bundles, terms_per_layer=9)))
    assert options is not None
    assert [bundle.digest for bundle in options.bundles] == [load_bundle(path).digest for path in bundles]
    assert options.layers == (0, 1, 3)
    assert options.terms_per_layer == 9


def test_layers_can_be_armed_for_bundles_that_come_later(bundles: list[Path]) -> None:
    """Beside the layers of the bundles, some or all; they are part of the compile key, and no bundle is needed."""
    for given, layers in (((5, 1, 5), (0, 1, 3, 5)), ("all", (0, 1, 2, 3, 4, 5)), ((), (0, 1, 3))):
        config = config_of(engine_arguments(bundles, layers=given))  # type: ignore[arg-type]
        options = options_from(config)
        assert options is not None
        assert options.layers == layers
        enter_compile_key(config, options)
        assert config.additional_config[CONFIG_KEY]["layers"] == list(layers)
        again = options_from(config)
        assert again is not None
        assert again.layers == layers
    alone = options_from(config_of(engine_arguments([], layers=[2])))
    assert alone is not None
    assert (alone.bundles, alone.layers) == ((), (2,))


@pytest.mark.parametrize("given", [[6], [-1], ["1"], [True], "some", {"1": 1}])
def test_layers_that_the_model_lacks_are_refused(given: object, bundles: list[Path]) -> None:
    """The error names what was given and what the model has."""
    arguments = engine_arguments(bundles)
    arguments["additional_config"][CONFIG_KEY]["layers"] = given
    with pytest.raises(UnsupportedConfiguration, match="numbers from 0 to 5"):
        options_from(config_of(arguments))


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {CONFIG_KEY: None}, {CONFIG_KEY: {}}])
def test_no_options_means_plain_vllm(additional: object) -> None:
    """An engine that was given nothing serves vLLM's own model."""
    assert options_from(SimpleNamespace(additional_config=additional)) is None


def test_paths_alone_may_be_given_by_hand(bundles: list[Path]) -> None:
    """Under plain `vllm serve --additional-config` a list of folders is enough; capacity has its default."""
    arguments = engine_arguments(bundles) | {"additional_config": {CONFIG_KEY: {"bundles": [str(bundles[0])]}}}
    options = options_from(config_of(arguments))
    assert options is not None
    assert (options.layers, options.terms_per_layer) == ((1, 3), DEFAULT_TERMS_PER_LAYER)


@pytest.mark.parametrize("option", ["worker_cls", "scheduler_cls"])
def test_steering_without_its_worker_or_scheduler_does_not_start(bundles: list[Path], option: str) -> None:
    """Either missing would run requests unsteered or share their cache: refused, with the value that is needed."""
    needed = {"worker_cls": WORKER_CLASS, "scheduler_cls": SCHEDULER_CLASS}[option]
    with pytest.raises(UnsupportedConfiguration, match=f"{option}='{needed}', this engine has 'auto'"):
        options_from(config_of(engine_arguments(bundles), **{option: "auto"}))


@pytest.mark.parametrize(
    "given",
    [{"bundles": []}, {"bundles": None}, {"terms_per_layer": 9}, {"bundles": "folder"}, {"bundels": ["folder"]}],
)
def test_options_that_name_no_bundles_are_refused(bundles: list[Path], given: dict[str, Any]) -> None:
    """A misspelt or empty option is a mistake, not a wish for plain vLLM."""
    with pytest.raises(UnsupportedConfiguration, match=CONFIG_KEY):
        options_from(config_of(engine_arguments(bundles), additional_config={CONFIG_KEY: given}))


def test_a_bundle_that_changed_since_the_gateway_read_it_is_refused(bundles: list[Path]) -> None:
    """The digest travels with the path: both ends of the server speak of the same bundle."""
    arguments = engine_arguments(bundles)
    manifest = bundles[0] / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(BundleDigestError, match="the engine was started with sha256:"):
        options_from(config_of(arguments))


def test_a_bundle_that_does_not_load_stops_the_start(tmp_path: Path) -> None:
    """The gateway finds out before vLLM is started."""
    with pytest.raises(BundleFormatError, match="cannot read"):
        engine_arguments([tmp_path / "absent"])


def test_compile_key_holds_version_layers_and_digests(bundles: list[Path]) -> None:
    """VLLM hashes `additional_config` into the key of its compile cache; reading the options again still works."""
    config = config_of(engine_arguments(bundles))
    options = options_from(config)
    assert options is not None
    enter_compile_key(config, options)
    entered = config.additional_config[CONFIG_KEY]
    assert entered["version"] == __version__
    assert entered["layers"] == [0, 1, 3]
    assert [entry["digest"] for entry in entered["bundles"]] == [bundle.digest for bundle in options.bundles]
    again = options_from(config)
    assert again is not None
    assert again.layers == options.layers


def test_a_bundle_that_spares_reasoning_says_where_it_ends(tmp_path: Path) -> None:
    """Without the token, or for a profile that edits the prompt, there is no bundle; with it an engine takes it."""
    edits = {"a": random_edit("a", ranks={1: 1})}
    manifest = manifest_of(edits)
    manifest["profiles"][0]["reasoning"] = "spared"
    with pytest.raises(BundleFormatError, match="no reasoning_end says where it ends"):
        save_bundle(tmp_path / "unsaid", manifest, edits)
    manifest["reasoning_end"] = {"token": "</think>", "token_id": 7}
    manifest["profiles"][0]["scope"] = "all"
    with pytest.raises(BundleFormatError, match="spares reasoning, so that its scope must be 'generated'"):
        save_bundle(tmp_path / "everywhere", manifest, edits)
    manifest["profiles"][0]["scope"] = "generated"
    save_bundle(tmp_path / "spared", manifest, edits)
    options = options_from(config_of(engine_arguments([tmp_path / "spared"])))
    assert options is not None
    assert options.bundles[0].manifest.is_sparing


def test_capture_is_chosen_where_the_engine_starts(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers travel in the options and so into the compile key, the folder in the environment; without it no start."""
    settings = CaptureSettings(folder=tmp_path / "captured", layers=(0, 2), generated=3, shard_bytes=1000)
    for given in (bundles, []):
        monkeypatch.delenv(CAPTURE_FOLDER_VARIABLE, raising=False)
        config = config_of(engine_arguments(given, capture=settings))
        assert str(tmp_path / "captured") not in str(config.additional_config)
        with pytest.raises(UnsupportedConfiguration, match=CAPTURE_FOLDER_VARIABLE):
            options_from(config)
        monkeypatch.setenv(CAPTURE_FOLDER_VARIABLE, str(tmp_path / "captured"))
        options = options_from(config)
        assert options is not None
        assert options.capture == settings
        enter_compile_key(config, options)
        assert config.additional_config[CONFIG_KEY]["capture"]["layers"] == [0, 2]


@pytest.mark.parametrize(
    "capture",
    [{"layer": [1]}, {"layers": "all"}, {"layers": [1.0]}, {"layers": []}, {"layers": [2, 1]}, {"generated": -1}, [1]],
)
def test_capture_that_cannot_be_followed_stops_the_start(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: object
) -> None:
    """Unknown keys, wrong types and ranges."""
    monkeypatch.setenv(CAPTURE_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UnsupportedConfiguration, match="capture"):
        options_from(config_of(engine_arguments(bundles), additional_config={CONFIG_KEY: {"capture": capture}}))
