"""Topic fits whose judge is a response probe: it goes where the edits go, since the engine reads with theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from steering.bundle import Bundle, load_bundle, save_bundle
from steering.evaluate.judge import ResponseProbeJudge
from steering.fingerprint import fingerprint_of
from steering.terms import Edit, added_direction
from tests.samples import manifest_of, random_probe, with_response
from tests.unit.fit.planted import WIDTH
from tests.unit.fit.planted_fits import planted_fit

DEMO = Path(__file__).resolve().parents[3] / "artifacts" / "demo"


def judging_bundle(model: Path, folder: Path) -> Bundle:
    """A bundle of the planted model with a response probe."""
    edit = Edit(name="e", layers=(added_direction(layer=1, direction=torch.eye(WIDTH)[0], coefficient=1.0),))
    probe = random_probe("response", layer=1, categories=(), width=WIDTH)
    manifest = manifest_of({"e": edit}, width=WIDTH) | {"model": fingerprint_of(model).model_dump()}
    return save_bundle(folder, with_response(manifest, probe, 4), {"e": edit}, {"response": probe})


def test_the_judging_probe_is_in_every_bundle_of_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited answers are read like plain ones, and the bundle that comes out tells refusals as well."""
    monkeypatch.setattr("steering.fit.topics.draw_stage", lambda path, _draw, *_results: path.touch())
    fitted = planted_fit(tmp_path, judge=ResponseProbeJudge())
    judging = judging_bundle(fitted.fit.model, tmp_path / "judging")
    fitted.fit = replace(fitted.fit, judging=judging, judge_facts={"name": "probe", "bundle": judging.digest})
    fitted.run()
    for folder in (fitted.fit.work / "candidates", fitted.bundle):
        bundle = load_bundle(folder)
        assert bundle.manifest.response_probe == "response"
        torch.testing.assert_close(bundle.probes["response"].weight, judging.probes["response"].weight)
    assert fitted.stage("judged")["verdicts"]["unparsable"] == 0
    assert load_bundle(fitted.bundle).manifest.profile("topics").comply


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "probe"], "--judge probe and --judge-bundle go together"),
        (["--judge-bundle", str(DEMO / "bundle")], "--judge probe and --judge-bundle go together"),
        (["--judge", "probe", "--judge-bundle", str(DEMO / "topics")], "has no response probe to judge with"),
    ],
)
def test_a_probe_without_its_bundle_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Before any engine starts, in one line."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n", "utf-8")
    given = ["fit", "topics", "--refused", str(prompts), "--answered", str(prompts), "--work", str(tmp_path / "work")]
    ended = CliRunner().invoke(app, [*given, "--model", str(DEMO / "model"), *arguments])
    assert ended.exit_code == 1
    assert message in ended.output
