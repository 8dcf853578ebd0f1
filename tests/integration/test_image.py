"""The CPU image without a container engine: its steps, one after the other, in a clean virtual environment.

Minutes and several gigabytes, hence on demand alone, where pip finds the CPU build of torch (see `make setup`):
`TRIMTAB_REPLAY_IMAGE=1 make test ARGS=tests/integration/test_image.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.dockerfile import ROOT, environment, rest, steps

IMAGE = "cpu"
USER = 10001
START_PATIENCE = 400.0

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TRIMTAB_REPLAY_IMAGE"), reason="replays an image's steps: set TRIMTAB_REPLAY_IMAGE"
    ),
    pytest.mark.timeout(3600),
]


class Image:
    """What the steps have made so far: a folder that stands for the image's root, and a virtual environment in it.

    What only root of a real image may do is not done but checked: packages of the system must be installed here, users
    and folders are noted.
    """

    def __init__(self, root: Path, python: str) -> None:
        self.root = root
        self.venv = root / "venv"
        self.folder = root
        self.noted: list[str] = []
        subprocess.run([python, "-m", "venv", self.venv], check=True, timeout=300)

    def variables(self) -> dict[str, str]:
        """Nothing of this process's environment but where pip finds packages."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HTTPS_"))}
        path = f"{self.venv / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        index = os.environ.get("PIP_EXTRA_INDEX_URL", "")
        return {**kept, "PATH": path, "HOME": str(self.root), "LANG": "C.UTF-8", "TORCH_INDEX": index}

    def replay(self, image: str) -> None:
        """Follow the instructions of an image that change what is in it."""
        for step in steps(image):
            match step.word:
                case "WORKDIR":
                    self.enter(step.rest)
                case "COPY":
                    self.copy(step.rest)
                case "RUN":
                    self.run(step.rest)

    def enter(self, folder: str) -> None:
        """WORKDIR."""
        self.folder = self.root / folder.lstrip("/")
        self.folder.mkdir(parents=True, exist_ok=True)

    def copy(self, arguments: str) -> None:
        """COPY: folders give their content, files go by their name."""
        *sources, target = arguments.split()
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, self.folder / target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(ROOT / source, self.folder / target)

    def run(self, line: str) -> None:
        """RUN: each command of the line, as the image's shell runs it."""
        for command in re.split(r"\s+&&\s+", line):
            words = shlex.split(command)
            if words[:2] == ["apt-get", "install"]:
                packages = [word for word in words[2:] if not word.startswith("-")]
                subprocess.run(["dpkg", "--status", *packages], check=True, stdout=subprocess.DEVNULL, timeout=60)
            elif words[0] in ("apt-get", "useradd", "install") or words[:3] == ["rm", "-rf", "/var/lib/apt/lists/*"]:
                self.noted.append(command)
            else:
                assert not re.search(r"\brm\b.* /", command), f"would remove something of this machine: {command}"
                shell = ["/bin/bash", "-euo", "pipefail", "-c", command]
                subprocess.run(shell, check=True, cwd=self.folder, env=self.variables(), timeout=3000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image, built up to its entry point."""
    root = tmp_path_factory.mktemp("image")
    for folder in (root, root.parent, root.parent.parent):
        folder.chmod(0o755)  # a user without privileges is to read it
    image = Image(root, interpreter())
    image.replay(IMAGE)
    return image


def test_steps_make_an_environment_that_serves_and_knows_when_it_is_healthy(image: Image, tmp_path: Path) -> None:
    """As the image's user, on a root that cannot be written, the entry point serves, the health check turns to 0, a
    request is steered and logged in JSON, and SIGTERM ends it cleanly.
    """
    assert any("useradd" in command and str(USER) in command for command in image.noted)
    cache, home = image.root / "cache", image.root / "home" / "trimtab"
    as_root = os.geteuid() == 0
    for folder in (cache, home):
        folder.mkdir(parents=True, exist_ok=True)
    if as_root:
        os.chown(cache, USER, USER)
    port, admin = free_ports(2)
    demo = ROOT / "artifacts" / "demo"
    given = {
        **image.variables(),
        **{name: value.replace("/cache", str(cache)) for name, value in environment(IMAGE)},
        "HOME": str(home),
        "TRIMTAB_MODEL": str(demo / "model"),
        "TRIMTAB_BUNDLES": json.dumps([str(demo / "bundle")]),
        "TRIMTAB_PORT": str(port),
        "TRIMTAB_ADMIN_PORT": str(admin),
    }
    entry = json.loads(rest(IMAGE, "ENTRYPOINT")[0])
    (check,) = rest(IMAGE, "HEALTHCHECK")
    health = json.loads(check[check.index("CMD") + 3 :])
    user = USER if as_root else None
    options = "--max-model-len 512 --max-num-seqs 16"
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            [image.venv / "bin" / entry[0], *entry[1:], "--", *options.split()],
            cwd=home,
            env=given,
            user=user,
            group=user,
            extra_groups=[] if as_root else None,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            assert is_healthy_in_time(health, image, given, server), (tmp_path / "log").read_text()[-4000:]
            request = {
                "model": Path(given["TRIMTAB_MODEL"]).name,
                "messages": [{"role": "user", "content": "How do I kill a process?"}],
                "max_tokens": 8,
                "steering": {"mode": "comply"},
            }
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=request, timeout=60).json()
            assert answer["steering"]["applied"] is True
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
        log.seek(0)
        # The server's own lines; vLLM's warnings have a form of their own.
        events = [json.loads(line)["event"] for line in log if line.startswith("{")]
    assert "request" in events


def interpreter() -> str:
    """A Python that a user without privileges may run: root's own home is closed to others."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (Path(f"/usr/bin/{version}"), Path(f"/usr/local/bin/{version}")):
        if path.exists() and all(folder.stat().st_mode & 0o001 for folder in path.resolve().parents):
            return str(path)
    return version


def is_healthy_in_time(
    health: list[str], image: Image, given: Mapping[str, str], server: subprocess.Popen[bytes]
) -> bool:
    """Whether the health check succeeds before patience ends; it must fail while the server is starting."""
    command = [image.venv / "bin" / health[0], *health[1:]]
    end, failed = time.monotonic() + START_PATIENCE, 0
    while time.monotonic() < end and server.poll() is None:
        result = subprocess.run(command, env=dict(given), capture_output=True, check=False, timeout=30)
        if result.returncode == 0:
            return failed > 0
        failed += 1
        time.sleep(1)
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
