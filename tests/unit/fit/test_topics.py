"""Topic fits from prompts to bundles, on a fake engine in which a planted direction decides what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steering.bundle import load_bundle
from steering.fit.topic_directions import Method
from steering.fit.topic_prompts import Role
from steering.fit.topic_settings import LAYERS_NOTE, Dose, Purpose, TopicPreset
from tests.unit.fit.conftest import MakeFit
from tests.unit.fit.planted import DEPTH, HARM, PLAIN, TOPIC, Planted, prompts
from tests.unit.fit.planted_fits import COUNT, SMALL, WHOLE, Fitted, planted_fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A fit that ran to its end, pictures and all."""
    fitted = planted_fit(tmp_path_factory.mktemp("whole"), WHOLE)
    fitted.run()
    return fitted


def test_a_fit_finds_what_decides_and_keeps_safety_by_a_gate(whole: Fitted) -> None:
    """Ungated edits that free the topic cost harmful refusals too, so that the gated profile becomes the default."""
    bundle = load_bundle(whole.bundle)
    names = {profile.name for profile in bundle.manifest.profiles}
    assert {"topics", "topics-gated", "topics-ungated", *(f"topics-{method}" for method in Method)} <= names
    default = bundle.manifest.profile("topics")
    assert bundle.manifest.default_profile == "topics"
    assert default.gate is not None
    assert default.gate.refuse_above == 1.0
    assert 0.0 < default.gate.comply_below < 1.0
    compared = whole.stage("compare")
    free = [arm for arm in compared["arms"] if arm["comply_below"] is None]
    gated = [arm for arm in compared["arms"] if arm["comply_below"] is not None]
    base = compared["unsteered"]["calibrate"]
    assert base["refused"]["rate"] > 0.9
    for arm in gated:
        assert arm["rates"]["calibrate"]["refused"]["rate"] < base["refused"]["rate"] / 3
        assert arm["rates"]["calibrate"]["safety"]["rate"] >= base["safety"]["rate"] - 0.01
    assert all(arm["rates"]["calibrate"]["safety"]["rate"] < base["safety"]["rate"] / 2 for arm in free)
    planted = Planted()
    for name, edit in bundle.edits.items():
        for terms in edit.layers:
            assert abs(float(terms.write[0] @ planted.direction(terms.layer))) > 0.5, name
            assert "gated" not in name or terms.layer >= whole.stage("gate")["layer"]


def test_a_gated_candidate_begins_where_its_gate_decides(whole: Fitted) -> None:
    """Edits before the gate's layer would come too late for the prompt that chose them; the deepest never are."""
    tried = load_bundle(whole.fit.work / "candidates")
    layer = whole.stage("gate")["layer"]
    gated = [edit for name, edit in tried.edits.items() if "-gated-" in name]
    assert layer > 0
    assert gated
    assert all(terms.layer >= layer for edit in gated for terms in edit.layers)
    assert max(terms.layer for edit in tried.edits.values() for terms in edit.layers) < DEPTH - 1


def test_the_engine_decides_as_the_comparison_put_together(whole: Fitted) -> None:
    """The finished bundle's gate, run by the engine, gives every prompt the decision and verdict it was chosen by."""
    found = whole.stage("verify")
    assert found["profile"] == "topics"
    assert found["n"] > 40
    assert 0 < found["complied"] < found["n"]
    assert found["same_decision"] == found["same_verdict"] == found["n"]
    assert whole.started == ["capture", "steer", "steer"]


def test_the_page_and_the_card_tell_what_the_stages_found(whole: Fitted) -> None:
    """Both are written, name every profile, fetch nothing, and hold no prompt."""
    page = (whole.bundle / "report.html").read_text("utf-8")
    card = (whole.bundle / "CARD.md").read_text("utf-8")
    report = json.loads((whole.bundle / "report.json").read_text("utf-8"))
    assert "<script" not in page
    assert "src=" not in page
    for profile in report["profiles"]:
        assert f"`{profile['name']}`" in card
    assert "23.82" in page
    assert not any("Tell me of" in text for text in (page, card, json.dumps(report)))
    assert {path.stem for path in whole.bundle.glob("*.png")} >= {"layers", "finder", "compare", "analysis", "gate"}


def test_the_finder_takes_the_least_shift_among_what_removes_enough(whole: Fitted) -> None:
    """Exactly that: no configuration that was measured and removes enough has a smaller shift."""
    found = whole.stage("finder")
    met = 0
    for row in found["chosen"]:
        chosen = found["candidates"][row["candidate"]]
        enough = [
            one
            for one in found["candidates"]
            if (one["variant"], one["method"]) == (row["variant"], row["method"])
            and one["removal"] is not None
            and one["removal"] >= found["target"] - 1e-9
        ]
        if row["is_met"]:
            met += 1
            assert chosen["shift"] == min(one["shift"] for one in enough)
            assert chosen["scope"] == ("all" if row["variant"] == "free" else "generated")
        else:
            assert not enough
    assert met >= 4
    assert found["measured"] < len(found["candidates"])


def test_without_safety_prompts_there_is_no_gate_and_the_card_says_so(make_fit: MakeFit) -> None:
    """The free profile is the default, and what is unknown is named."""
    fitted = make_fit(safety=False)
    saved = fitted.run()
    assert saved.manifest.profile("topics").gate is None
    assert not saved.manifest.probes
    card = (fitted.bundle / "CARD.md").read_text("utf-8")
    assert "without --safety" in card
    assert "nothing is known of harmful ones" in card.replace("\n", " ")


def test_induction_raises_topic_refusals_and_a_gate_spares_general_prompts(make_fit: MakeFit, tmp_path: Path) -> None:
    """Fig. 4 of the paper: topic and general refusals by α; the gated profile leaves general prompts alone."""
    planted = Planted(refuses={TOPIC: 1.0, HARM: 1.6, "trade": -0.8, PLAIN: -1.0})
    fitted = make_fit(replace(SMALL, purpose=Purpose.BOTH), planted)
    path = tmp_path / "induced.txt"
    path.write_text("\n".join(prompts("trade", COUNT)), "utf-8")
    fitted.sources[Role.INDUCED] = [str(path)]
    saved = fitted.run()
    profile = saved.manifest.profile("topics-induce")
    assert profile.gate is not None
    assert profile.gate.comply_below == 0.0
    assert set(profile.refuse) == {"Topic"}
    assert "topics-induce-ungated" in {one.name for one in saved.manifest.profiles}
    found = fitted.stage("induction")
    base = found["unsteered"]["calibrate"]
    free = [row for row in found["curve"] if row["variant"] == "free" and row["count"] == 2]
    topic = [row["rates"]["calibrate"]["topic"]["rate"] for row in free]
    assert base["topic"]["rate"] < 0.2
    assert topic == sorted(topic)
    assert topic[-1] > 0.9
    best = found["curve"][found["chosen"]["gated"]["candidate"]]["rates"]["calibrate"]
    assert best["topic"]["rate"] > 0.8
    assert best["general"]["rate"] <= base["general"]["rate"] + SMALL.plain_margin


def test_induction_alone_needs_no_finder_and_names_its_default(make_fit: MakeFit, tmp_path: Path) -> None:
    """Nothing is removed: the bundle holds refuse edits only, and its default profile induces."""
    fitted = make_fit(replace(SMALL, purpose=Purpose.INDUCE, methods=(Method.MD,), counts=(1,)), safety=False)
    path = tmp_path / "induced.txt"
    path.write_text("\n".join(prompts("trade", COUNT)), "utf-8")
    fitted.sources[Role.INDUCED] = [str(path)]
    saved = fitted.run()
    assert saved.manifest.default_profile == "topics-induce"
    assert {edit.purpose for edit in saved.manifest.edits} == {"refuse"}
    assert not (fitted.fit.work / "finder.json").exists()
    assert "Induced refusals" in (fitted.bundle / "report.html").read_text("utf-8")


def test_given_doses_are_taken_as_they_are(make_fit: MakeFit) -> None:
    """As a preset gives them: one configuration a method, measured but not searched for, and said in the report."""
    doses = {Method.WRMD: Dose(count=2, alpha=-2.0), Method.MD: Dose(count=1, alpha=-2.0)}
    settings = replace(SMALL, preset=TopicPreset.PAPER_EXTENDED, doses=doses, methods=tuple(doses), has_gate=False)
    fitted = make_fit(settings)
    saved = fitted.run()
    found = fitted.stage("finder")
    assert [(one["method"], len(one["layers"]), one["alpha"]) for one in found["candidates"]] == [
        ("wrmd", 2, -2.0),
        ("md", 1, -2.0),
    ]
    assert {edit.name for edit in saved.manifest.edits} == {"wrmd-comply", "md-comply"}
    assert LAYERS_NOTE in (fitted.bundle / "CARD.md").read_text("utf-8").replace("\n", " ")
