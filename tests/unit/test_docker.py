"""The images and the compose file: what runs is not root, can write where it must, and is told no secret.

No container engine is needed: the files are read as what they are.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.dockerfile import IMAGES, ROOT, environment, rest, steps

DOCKER = ROOT / "docker"
SECRET = re.compile(r"(?i)(password|secret|token|api_?key|credential)")
PINNED = re.compile(r"^[a-z0-9./-]+:(?!latest$)[A-Za-z0-9._-]*[0-9][A-Za-z0-9._-]*$")

pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="needs a checkout: the wheel holds no images")


def compose() -> dict[str, Any]:
    """The compose file."""
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def variables(names: Any) -> set[str]:
    """Those that this server reads."""
    return {name for name in names if name.startswith("TRIMTAB_")}


@pytest.mark.parametrize("image", IMAGES)
class TestImages:
    def test_runs_as_a_user_without_privileges(self, image: str) -> None:
        """The last user is a number above the system's own, so that an orchestrator can see that it is not root."""
        order = [step.word for step in steps(image)]
        assert int(rest(image, "USER")[-1]) >= 10_000
        assert order.index("USER") < order.index("ENTRYPOINT")
        assert "RUN" not in order[order.index("USER") :]

    def test_is_healthy_when_ready(self, image: str) -> None:
        """Health is what the admin port's /readyz says, asked with what the image has."""
        (check,) = rest(image, "HEALTHCHECK")
        assert "/readyz" in check
        assert "TRIMTAB_ADMIN_PORT" in check
        command = json.loads(check[check.index("CMD") + 3 :])
        compile(command[2], "healthcheck", "exec")

    def test_shows_the_ports_that_the_server_opens(self, image: str) -> None:
        """One for clients, one for operators, at their defaults."""
        fields = Settings.model_fields
        assert rest(image, "EXPOSE") == [f"{fields['port'].default} {fields['admin_port'].default}"]

    def test_copies_what_is_there_and_let_through(self, image: str) -> None:
        """Every source exists, and .dockerignore does not keep it away."""
        let_through = {
            line[1:].rstrip("/")
            for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            if line.startswith("!")
        }
        sources = [source for line in rest(image, "COPY") for source in line.split()[:-1]]
        assert sources
        assert [source for source in sources if not (ROOT / source).exists()] == []
        assert set(sources) <= let_through

    def test_holds_no_secret_and_fetches_nothing_unchecked(self, image: str) -> None:
        """No ADD, no variable or build argument that is named like a secret; every download has its hash."""
        words = {step.word for step in steps(image)}
        assert "ADD" not in words
        named = [line for word in ("ENV", "ARG", "COPY") for line in rest(image, word)]
        assert [line for line in named if SECRET.search(line)] == []
        installs = [part for line in rest(image, "RUN") for part in line.split("&&") if "pip install" in part]
        own = [part for part in installs if part.split()[-1] == "."]
        assert len(own) == 1
        assert all("--require-hashes" in part for part in installs if part not in own)
        assert all("--no-deps" in part for part in installs)

    def test_base_is_named_by_a_version_and_can_be_named_by_digest(self, image: str) -> None:
        """What an image is built on is a build argument with a tag that has a version."""
        (base,) = rest(image, "FROM")
        default = dict(line.split("=", 1) for line in rest(image, "ARG") if "=" in line)
        assert PINNED.match(default[base.strip("${}")])

    def test_writes_only_to_its_volumes(self, image: str) -> None:
        """Caches go to a volume, since the root file system is mounted read-only; the volumes belong to its user."""
        volumes = json.loads(rest(image, "VOLUME")[0])
        assert {value.split("/")[1] for name, value in environment(image) if "CACHE" in name and "/" in value} == {
            "cache"
        }
        made = next(line for line in rest(image, "RUN") if "useradd" in line)
        assert all(volume in made for volume in volumes)

    def test_sets_what_the_server_reads(self, image: str) -> None:
        """Each TRIMTAB_ variable is a setting."""
        assert variables(name for name, _ in environment(image)) <= known_variables()


@pytest.mark.parametrize("lock", ["cpu", "cuda", "dev"])
def test_locks_pin_every_distribution_by_version_and_hash(lock: str) -> None:
    """One exact version each, no address, no range; whatever is downloaded is checked."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    names = [re.match(r"([a-z0-9][a-z0-9-]*)==\S+", entry) for entry in entries]
    assert all(names)
    assert len({name[1] for name in names if name}) == len(names)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", entry) for entry in entries)


class TestCompose:
    def test_nothing_runs_with_more_than_it_needs(self) -> None:
        """Read-only root, no capability, no new privilege, not the host's network, for every service."""
        for name, service in compose()["services"].items():
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert "no-new-privileges:true" in service["security_opt"], name
            assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "user", "devices"} & service.keys(), name

    def test_is_reached_from_the_host_alone(self) -> None:
        """Every published port is bound to loopback, and the admin port is not published."""
        ports = [port for service in compose()["services"].values() for port in service["ports"]]
        assert all(port.startswith("127.0.0.1:") for port in ports)
        assert not any(port.endswith(":8001") for port in ports)

    def test_images_are_named_by_a_version(self) -> None:
        """What is not built here is pulled by a tag that has a version."""
        pulled = [service["image"] for service in compose()["services"].values() if "build" not in service]
        assert pulled
        assert all(PINNED.match(image) for image in pulled)

    def test_secrets_are_files(self) -> None:
        """No password or key stands in the environment; those named there are files under /run/secrets."""
        loaded = compose()
        for service in loaded["services"].values():
            for name, value in service.get("environment", {}).items():
                assert not SECRET.search(name) or str(value).startswith("/run/secrets/"), name
            assert set(service.get("secrets", ())) <= loaded["secrets"].keys()
        assert all(set(secret) == {"file"} for secret in loaded["secrets"].values())
        for folder in (DOCKER / "secrets", DOCKER / "secrets" / "server"):
            assert (folder / ".gitignore").read_text(encoding="utf-8").splitlines()[1:3] == ["*", "!.gitignore"]

    def test_mounts_what_is_there(self) -> None:
        """Every file that is mounted from the project exists, read-only; the rest are volumes of its own."""
        loaded = compose()
        for name, service in loaded["services"].items():
            for mount in service["volumes"]:
                source, _, mode = re.fullmatch(r"(\$\{.*?\}|[^:]+):([^:]+)(?::(ro))?", mount).groups()  # type: ignore[union-attr]
                if default := re.fullmatch(r"\$\{\w+:-(.*)\}", source):
                    source = default[1]
                if not source.startswith("."):
                    assert source in loaded["volumes"], mount
                    continue
                assert mode == "ro", mount
                assert name == "server-cuda" or (DOCKER / source).exists(), mount

    def test_server_gets_settings_that_it_reads(self) -> None:
        """Each TRIMTAB_ variable is a setting; with keys it listens where other containers reach it."""
        for name in ("server", "server-cuda"):
            given = compose()["services"][name]["environment"]
            assert variables(given) <= known_variables()
            assert given["TRIMTAB_KEYS_FILE"] == "/run/secrets/trimtab/keys.json"

    def test_settings_file_is_read_and_leaves_time_to_drain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the variables of compose the server takes the file, and is not killed before its requests have had the
        time that it gives them.
        """
        for name in ("server", "server-cuda"):
            service = compose()["services"][name]
            for variable, value in service["environment"].items():
                monkeypatch.setenv(variable, str(DOCKER / "trimtab.toml") if variable == "TRIMTAB_CONFIG" else value)
            settings = Settings()
            assert f"./trimtab.toml:{service['environment']['TRIMTAB_CONFIG']}:ro" in service["volumes"]
            assert [str(path) for path in settings.bundles] == ["/bundles/bundle"]
            assert settings.host == "0.0.0.0"  # noqa: S104 - a container of its own
            grace = float(service["stop_grace_period"].removesuffix("s"))
            assert grace > settings.drain_delay + settings.drain_grace + 30

    def test_prometheus_finds_the_server(self) -> None:
        """The target is an alias on a network that both are on, and the admin port."""
        scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
        (job,) = scraped["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"server:{Settings.model_fields['admin_port'].default}"]}]
        services = compose()["services"]
        for name in ("server", "server-cuda"):
            assert services[name]["networks"]["monitoring"]["aliases"] == ["server"]
        assert "monitoring" in services["prometheus"]["networks"]


def known_variables() -> set[str]:
    """The variables that settings are read from."""
    return {f"TRIMTAB_{name.upper()}" for name in Settings.model_fields}
