"""The Kubernetes manifests: probes, drain and limits agree with the server that they run.

`make check` holds them against Kubernetes' own schemas; no cluster is needed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from server.access.keys import KeyFile, hash_of, new_key
from server.settings import Settings
from tests.unit.test_docker import known_variables, variables

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs a checkout: the wheel holds no manifests")


@functools.cache
def manifests() -> dict[str, dict[str, Any]]:
    """Every manifest by its kind."""
    loaded = [
        manifest
        for path in sorted(FOLDER.rglob("*.yaml"))
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]
    kinds = {manifest["kind"]: manifest for manifest in loaded}
    assert len(kinds) == len(loaded)
    return kinds


def pod() -> dict[str, Any]:
    """What a replica is."""
    found: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    """The only container of it."""
    (only,) = pod()["containers"]
    found: dict[str, Any] = only
    return found


def environment() -> dict[str, str]:
    """Its variables."""
    return {entry["name"]: entry["value"] for entry in container()["env"]}


def test_all_that_is_needed_is_there() -> None:
    """Replicas, their address, who may reach them, what may be taken away, settings and keys."""
    kinds = {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap", "Secret"}
    assert manifests().keys() == kinds


def test_runs_with_nothing_that_it_does_not_need() -> None:
    """Not root, no privilege, no capability, no writable root, no token of the cluster."""
    assert pod()["securityContext"] | {"runAsNonRoot": True, "runAsUser": 10001} == pod()["securityContext"]
    assert pod()["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_services_variables_are_not_taken_for_settings() -> None:
    """Kubernetes would set TRIMTAB_PORT to an address for a Service of that name."""
    assert pod()["enableServiceLinks"] is False
    assert variables(environment()) <= known_variables()


def test_drain_ends_before_the_pod_is_killed() -> None:
    """Grace is longer than what happens in it, with 30 s for the engine to end."""
    drain = float(environment()["TRIMTAB_DRAIN_DELAY"]) + float(environment()["TRIMTAB_DRAIN_GRACE"])
    pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] >= pause + drain + 30
    readiness = container()["readinessProbe"]
    assert pause >= readiness["periodSeconds"]


def test_probes_ask_the_admin_port() -> None:
    """Readiness decides on traffic and on the end of the start, life on a restart."""
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    fields = Settings.model_fields
    assert ports == {"http": fields["port"].default, "admin": fields["admin_port"].default}
    asked = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert asked == {
        "startup": {"path": "/readyz", "port": "admin"},
        "readiness": {"path": "/readyz", "port": "admin"},
        "liveness": {"path": "/livez", "port": "admin"},
    }


def test_clients_and_operators_come_by_different_ports() -> None:
    """The Service leads to the clients' port alone; the policy lets monitoring to the other; nothing leaves."""
    (port,) = manifests()["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"
    policy = manifests()["NetworkPolicy"]["spec"]
    assert [[rule["ports"][0]["port"], len(rule["ports"]), "from" in rule] for rule in policy["ingress"]] == [
        [8000, 1, True],
        [8001, 1, True],
    ]
    assert policy["egress"] == []
    annotations = manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "8001"


def test_labels_lead_to_the_pods() -> None:
    """Whatever selects pods selects these."""
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests()["Service"]["spec"]["selector"] == labels
    for kind, where in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert manifests()[kind]["spec"][where]["matchLabels"] == labels


def test_everything_mounted_is_a_volume_and_writable_only_where_the_server_writes() -> None:
    """Models, settings and keys are read-only."""
    volumes = {volume["name"] for volume in pod()["volumes"]}
    mounts = container()["volumeMounts"]
    assert {mount["name"] for mount in mounts} == volumes
    written = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    assert written == {"/audit", "/cache", "/dev/shm", "/tmp"}  # noqa: S108 - a mount of its own


def test_a_gpu_is_asked_for_once() -> None:
    """Kubernetes wants requests and limits of a device to be equal."""
    resources = container()["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 1
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_key_in_the_secret_opens_nothing() -> None:
    """The committed file of keys is right but for its hash, for which the server refuses it."""
    (text,) = manifests()["Secret"]["stringData"].values()
    with pytest.raises(ValidationError, match="sha256"):
        KeyFile.model_validate_json(text)
    assert KeyFile.model_validate_json(text.replace("REPLACE", hash_of(new_key()))).keys[0].id == "first"


def test_settings_in_the_config_map_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server reads them, with the variables of the Deployment, and listens where pods are reached."""
    path = tmp_path / "trimtab.toml"
    path.write_text(manifests()["ConfigMap"]["data"]["trimtab.toml"], encoding="utf-8")
    for name, value in environment().items():
        monkeypatch.setenv(name, str(path) if name == "TRIMTAB_CONFIG" else value)
    settings = Settings()
    assert settings.host == settings.admin_host == "0.0.0.0"  # noqa: S104 - a pod of its own
    assert settings.drain_grace == float(environment()["TRIMTAB_DRAIN_GRACE"])
    mounted = {volume["name"]: volume for volume in pod()["volumes"]}
    assert mounted["config"]["configMap"]["name"] == manifests()["ConfigMap"]["metadata"]["name"]
    assert mounted["keys"]["secret"]["secretName"] == manifests()["Secret"]["metadata"]["name"]
