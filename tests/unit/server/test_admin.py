"""Administration: bundles come and go while the server runs, and whatever fails leaves it as it was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.app import create_admin_app, create_app, create_gateway
from server.catalog import BundleView
from server.settings import Settings
from steering.errors import BundleDigestError, CapacityExceeded, EngineError, FingerprintMismatch, OperatorError
from tests.fakes import FakeEngine, make_bundle, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, Spoken, _client_of, chat_body

SECOND = make_bundle(name="second", digest="sha256:" + "12" * 32)
BUNDLES = {"second": SECOND, "gated": make_gated_bundle(), "clash": make_bundle(digest="sha256:" + "34" * 32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The operator's folder: bundles, a folder that is none, and links that lead outside."""
    root, outside = tmp_path / "bundles", tmp_path / "outside"
    for path in (*(root / name for name in BUNDLES), outside):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "link").symlink_to(outside)
    (root / ".hidden").symlink_to(root / "second")
    return root


class Administered:
    """A gateway over a fake engine, with a folder of bundles."""

    def __init__(
        self,
        folder: Path | None,
        engine: FakeEngine | None = None,
        fails: Exception | None = None,
        **settings: Any,
    ) -> None:
        self.engine = engine or FakeEngine(bundles=[make_bundle()])
        self.engine.loadable = {} if folder is None else {(folder / name): view for name, view in BUNDLES.items()}
        self.fails = fails
        self.checked: list[Path] = []
        self.gateway = create_gateway(
            self.engine, make_catalog(), Settings(bundle_folder=folder, **settings), check=self._check
        )
        self.gateway.is_armed = True
        app = create_app(self.gateway)
        self.spoken = Spoken(
            gateway=self.gateway, app=app, client=_client_of(app), admin=_client_of(create_admin_app(self.gateway))
        )

    def _check(self, path: Path) -> BundleView:
        self.checked.append(path)
        if self.fails is not None:
            raise self.fails
        return BUNDLES[path.name]

    async def ask(self, act: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """The status and the body of an answer."""
        response = await self.spoken.admin.post(f"/admin/bundles/{act}", json=fields)
        return response.status_code, response.json()

    @property
    def labels(self) -> list[str]:
        """Names of the bundles on offer."""
        return [bundle.name for bundle in self.gateway.catalog.now.bundles]

    @property
    def held(self) -> list[str]:
        """Names of the bundles in the engine."""
        return [bundle.name for bundle in self.engine.bundles]


async def test_a_bundle_comes_serves_and_goes(folder: Path) -> None:
    """Loaded, its profile can be asked for and the metric names it; unloaded, neither is so, and it can come again."""
    server = Administered(folder)
    steering = {"profile": "second/refusal-control", "mode": "comply"}
    assert (await server.spoken.chat(steering=steering)).status_code == 400
    for _ in range(2):
        status, body = await server.ask("load", name="second")
        assert (status, body["label"], body["status"]) == (200, SECOND.label, "loaded")
        assert (await server.spoken.chat(steering=steering)).json()["steering"]["bundle"] == SECOND.label
        assert SECOND.label in (await server.spoken.admin.get("/metrics")).text
        status, body = await server.ask("unload", bundle="second")
        assert (status, body["status"]) == (200, "unloaded")
        assert (await server.spoken.chat(steering=steering)).status_code == 400
        assert SECOND.label not in (await server.spoken.admin.get("/metrics")).text
    assert server.held == ["fake-bundle"]


@pytest.mark.parametrize("wanted", [SECOND.name, SECOND.label, SECOND.digest])
async def test_a_bundle_is_unloaded_by_any_of_its_names(folder: Path, wanted: str) -> None:
    """Its name, its label as answers tell it, or its digest."""
    server = Administered(folder)
    await server.ask("load", name="second")
    assert (await server.ask("unload", bundle=wanted))[0] == 200
    assert server.held == ["fake-bundle"]


async def test_what_is_loaded_and_loadable_is_listed(folder: Path) -> None:
    """Folders without a manifest, hidden ones and links that lead outside are not."""
    server = Administered(folder)
    listed = (await server.spoken.admin.get("/admin/bundles")).json()
    assert [(bundle["name"], bundle["is_default"]) for bundle in listed["data"]] == [("fake-bundle", True)]
    assert listed["loadable"] == ["clash", "gated", "second"]


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../outside", "second/../../outside", "/etc", "link", "empty", ".hidden", "second/", "a\\b", "x" * 200],
)
@pytest.mark.parametrize("act", ["load", "verify"])
async def test_only_names_inside_the_folder_are_taken(folder: Path, act: str, name: str) -> None:
    """No path, no dots, no link that leads outside: nothing is read, and the answer lists what there is."""
    server = Administered(folder)
    status, body = await server.ask(act, name=name)
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "bundle_not_found", "name")
    assert "['clash', 'gated', 'second']" in body["error"]["message"]
    assert server.checked == []


async def test_without_a_folder_nothing_can_be_loaded() -> None:
    """The list is empty and loading says which option is missing."""
    server = Administered(None)
    assert (await server.spoken.admin.get("/admin/bundles")).json()["loadable"] == []
    status, body = await server.ask("load", name="second")
    assert status == 404
    assert "--bundle-folder" in body["error"]["message"]


async def test_verifying_loads_nothing(folder: Path) -> None:
    """The checks of loading, and no more; a bundle that does not pass is told by the code of what was found."""
    server = Administered(folder)
    status, body = await server.ask("verify", name="second")
    assert (status, body["status"], body["digest"]) == (200, "valid", SECOND.digest)
    server.fails = BundleDigestError("wrong")
    status, body = await server.ask("verify", name="second")
    assert (status, body["error"]["code"]) == (422, "bundle_digest")
    assert server.held == ["fake-bundle"]
    assert server.labels == ["fake-bundle"]


async def test_a_bundle_of_another_model_never_reaches_the_engine(folder: Path) -> None:
    """The check comes first."""
    server = Administered(folder, fails=FingerprintMismatch("made for another model"))
    status, body = await server.ask("load", name="second")
    assert (status, body["error"]["code"]) == (422, "bundle_fingerprint")
    assert server.held == server.labels == ["fake-bundle"]


async def test_a_bundle_that_does_not_steer_is_taken_back(folder: Path) -> None:
    """Its op never runs: it is not offered, and the engine does not keep it."""
    server = Administered(folder, FakeEngine(bundles=[make_bundle()], runs_ops=False))
    status, body = await server.ask("load", name="second")
    assert (status, body["error"]["code"]) == (422, "plugin_not_armed")
    assert server.held == server.labels == ["fake-bundle"]


async def test_a_bundle_that_changed_after_its_check_is_taken_back(folder: Path) -> None:
    """What the engine read must be what was checked."""
    server = Administered(folder)
    server.engine.loadable = {folder / "second": make_bundle(name="second", digest="sha256:" + "56" * 32)}
    status, body = await server.ask("load", name="second")
    assert (status, body["error"]["code"]) == (422, "bundle_digest")
    assert server.held == server.labels == ["fake-bundle"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(CapacityExceeded("full"), 503), (EngineError("no answer"), 500), (OperatorError("not armed"), 422)],
)
async def test_an_engine_that_cannot_load_is_told_as_it_is(folder: Path, error: Exception, status: int) -> None:
    """No room is 503 and to be tried again, what the server was not started for is refused, the rest is 500."""

    class Full(FakeEngine):
        async def load(self, path: Path) -> str:
            raise error

    server = Administered(folder, Full(bundles=[make_bundle()]))
    assert (await server.ask("load", name="second"))[0] == status
    assert server.labels == ["fake-bundle"]


async def test_names_and_the_default_stay_unique(folder: Path) -> None:
    """Another bundle of a name that is loaded, and the default one's departure, are conflicts; twice is none."""
    server = Administered(folder)
    status, body = await server.ask("load", name="clash")
    assert (status, body["error"]["code"]) == (409, "bundle_conflict")
    status, body = await server.ask("unload", bundle="fake-bundle")
    assert (status, body["error"]["code"]) == (409, "bundle_conflict")
    status, body = await server.ask("unload", bundle="nothing")
    assert (status, body["error"]["code"]) == (404, "bundle_not_found")
    assert [(await server.ask("load", name="second"))[0] for _ in range(2)] == [200, 200]
    assert server.labels == server.held == ["fake-bundle", "second"]


async def test_acts_come_one_after_the_other(folder: Path) -> None:
    """Eight that load the same at once load it once, and each is counted."""
    server = Administered(folder)
    statuses = [status for status, _ in await asyncio.gather(*(server.ask("load", name="gated") for _ in range(8)))]
    assert statuses == [200] * 8
    assert server.labels == server.held == ["fake-bundle", "gated-bundle"]
    assert (
        'steering_bundle_loads_total{action="load",result="done"} 8.0'
        in (await server.spoken.admin.get("/metrics")).text
    )


async def test_a_request_in_flight_outlives_its_bundle(folder: Path) -> None:
    """Resolved before the bundle went, it is steered to its end by it."""
    server = Administered(folder)
    await server.ask("load", name="second")
    server.engine.gate, before = asyncio.Event(), len(server.engine.calls)
    steering = {"profile": "second/refusal-control", "mode": "comply"}
    asked = asyncio.create_task(server.spoken.chat(steering=steering))
    while len(server.engine.calls) == before:
        await asyncio.sleep(0.001)
    held = server.engine.bundles
    assert (await server.ask("unload", bundle="second"))[0] == 200
    server.engine.bundles = held  # as the real one, which keeps it for those that name it
    server.engine.gate.set()
    assert (await asked).json()["steering"]["bundle"] == SECOND.label


async def test_every_act_is_on_record_before_it_is_done(folder: Path, tmp_path: Path) -> None:
    """Who asked for what, also where it is refused; looking at the list is no act."""
    server = Administered(folder, audit_log=tmp_path / "audit.jsonl")
    await server.ask("load", name="second")
    await server.ask("verify", name="gated")
    await server.ask("unload", bundle="nothing")
    await server.spoken.admin.get("/admin/bundles")
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(record["act"], record.get("name", record.get("bundle"))) for record in records] == [
        ("bundle_load", "second"),
        ("bundle_verify", "gated"),
        ("bundle_unload", "nothing"),
    ]


async def test_clients_cannot_administrate(make: Make) -> None:
    """The paths are not on their port; bodies are as strict as theirs on the other."""
    spoken = make()
    for path in ("/admin/bundles", "/admin/bundles/load"):
        assert (await spoken.client.get(path)).status_code == 404
    for body in ({}, {"name": 3}, {"name": "x", "path": "/"}):
        assert (await spoken.admin.post("/admin/bundles/load", json=body)).status_code == 400
    assert (await spoken.client.post("/v1/chat/completions", json=chat_body())).status_code == 200
