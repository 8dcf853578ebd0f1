"""Topic fits from prompts to bundles, on a fake engine in which a planted direction decides what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.bundle import load_bundle
from steering.errors import CaptureError, OperatorError, TooFewPrompts, UnknownPreset
from steering.evaluate.judge import Evidence, Judge, Judged, KeywordJudge, TokenJudge, Verdict
from steering.fit.datasets import DataDirectory
from steering.fit.topic_directions import Method
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_prompts import Role
from steering.fit.topic_settings import (
    LAYERS_NOTE,
    PAPER_MODELS,
    Dose,
    Purpose,
    TopicPreset,
    TopicSettings,
    topic_settings,
)
from steering.fit.topics import TopicStage, fit_topics
from tests.unit.fit.planted import DEPTH, HARM, PLAIN, REFUSAL, RESPOND, TOPIC, Planted, model_folder, opener, prompts

WHOLE = TopicSettings(
    samples=3,
    max_tokens=64,
    counts=(1, 2),
    alphas=(0.5, 1.0, 2.0, 4.0),
    shift_prompts=8,
    finder_prompts=10,
    gated=20,
    ranged=4,
    strengths=(1.0, 1.5),
    bootstrap=2,
    least=4,
)
SMALL = replace(WHOLE, methods=(Method.MD, Method.WRMD), alphas=(1.0, 2.0), repositions=False, bootstrap=0)
"""Half the methods and a fraction of the configurations, for tests that look at something else."""

COUNT = 80
"""Prompts of each kind."""

NOWHERE = DataDirectory(path=Path("no-such-folder"))
TOKENS = TokenJudge(refusals={REFUSAL: "Political"}, respond=RESPOND)


@dataclass
class Fitted:
    """A fit on a planted model, ready to run.

    Attributes:
        said: what it told.
        started: engines that were started.
    """

    fit: TopicFit
    sources: dict[Role, Sequence[str]]
    bundle: Path
    said: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def run(self, until: TopicStage = TopicStage.BUNDLE) -> Any:
        """The whole, or up to a stage."""
        return fit_topics(self.fit, self.sources, NOWHERE, self.bundle, name="planted", version="1", until=until)

    def stage(self, name: str) -> dict[str, Any]:
        """What a stage left."""
        found: dict[str, Any] = json.loads((self.fit.work / f"{name}.json").read_text("utf-8"))
        return found


def planted_fit(
    folder: Path,
    settings: TopicSettings = SMALL,
    planted: Planted | None = None,
    judge: Judge = TOKENS,
    *,
    safety: bool = True,
    work: str = "work",
) -> Fitted:
    """A fit whose files all lie in one folder."""
    sources: dict[Role, Sequence[str]] = {}
    for role, word in ((Role.REFUSED, TOPIC), (Role.ANSWERED, PLAIN), (Role.SAFETY, HARM)):
        if role is Role.SAFETY and not safety:
            continue
        path = folder / f"{role}.txt"
        path.write_text("\n".join(prompts(word, COUNT)), "utf-8")
        sources[role] = [str(path)]
    said: list[str] = []
    started: list[str] = []
    fit = TopicFit(
        model=model_folder(folder / "model"),
        work=folder / work,
        settings=settings,
        judge=judge,
        open_engine=opener(planted or Planted(), started),
        judge_facts={"name": judge.name},
        say=said.append,
    )
    return Fitted(fit=fit, sources=sources, bundle=folder / "bundle", said=said, started=started)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A fit that ran to its end, pictures and all."""
    fitted = planted_fit(tmp_path_factory.mktemp("whole"), WHOLE)
    fitted.run()
    return fitted


Make = Callable[..., Fitted]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes fits in one folder whose pictures are empty files: drawing takes longer than all else."""
    monkeypatch.setattr("steering.fit.topics.draw_stage", lambda path, _draw, *_results: path.touch())
    return partial(planted_fit, tmp_path)


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


def test_a_finished_stage_is_not_run_again_and_a_changed_one_is(make: Make) -> None:
    """A second run starts no engine; another judge keeps answers and residuals, and judges anew."""
    make().run()
    again = make()
    assert again.run() is not None
    assert again.started == []
    assert not any(line.endswith(": running") for line in again.said)
    other = make(judge=KeywordJudge())
    other.run(TopicStage.FINDER)
    assert any(line.startswith("answers: kept") for line in other.said)
    assert "judged: running" in other.said
    assert other.started == ["steer"]


def test_answers_go_on_after_the_last_part(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are on disk are not asked again, and the residuals are those of all prompts."""
    monkeypatch.setattr("steering.fit.topic_answers.PART", 50)
    whole = make(work="whole")
    whole.run(TopicStage.VECTORS)
    cut = make(work="cut")
    cut.run(TopicStage.ANSWERS)
    parts = sorted((cut.fit.work / "answers").glob("*.json"))
    assert len(parts) > 3
    parts[-1].unlink()
    (cut.fit.work / "answers.json").unlink()
    again = make(work="cut")
    again.run(TopicStage.VECTORS)
    assert [line for line in again.said if line.startswith("  answers: ")] == [
        f"  answers: {3 * COUNT} of {3 * COUNT} prompts"
    ]
    for key, value in whole.fit.tensors("vectors").items():
        assert torch.equal(value, again.fit.tensors("vectors")[key])


@dataclass
class Failing:
    """A judge whose endpoint is down after some verdicts."""

    left: int
    name: str = "llm"

    def judge(self, pairs: Any, on_progress: Any = None, *, evidence: Sequence[Evidence] | None = None) -> list[Judged]:
        """Raises once `left` runs out."""
        del on_progress, evidence
        self.left -= len(pairs)
        if self.left < 0:
            raise OperatorError("the judge's endpoint does not answer")
        return KeywordJudge().judge(pairs)


def test_a_judge_that_is_down_leaves_finished_stages(make: Make) -> None:
    """The error passes through; answers are kept, and a judge that is back goes on from there."""
    down = make(judge=Failing(left=COUNT))
    with pytest.raises(OperatorError, match="endpoint does not answer"):
        down.run()
    assert (down.fit.work / "answers.json").is_file()
    assert not (down.fit.work / "judged.json").exists()
    back = make(judge=Failing(left=10**9))
    assert back.run() is not None
    assert any(line.startswith("answers: kept") for line in back.said)


@dataclass
class Undecided:
    """A judge that says nothing."""

    name: str = "llm"

    def judge(self, pairs: Any, on_progress: Any = None, *, evidence: Sequence[Evidence] | None = None) -> list[Judged]:
        """Unparsable, always."""
        del on_progress, evidence
        return [Judged(verdict=Verdict.UNPARSABLE)] * len(pairs)


def test_a_judge_without_verdicts_gives_no_vectors(make: Make) -> None:
    """Unparsable verdicts count for neither side, so that there is nothing to make a direction of."""
    fitted = make(judge=Undecided())
    with pytest.raises(TooFewPrompts):
        fitted.run()
    assert fitted.stage("judged")["unjudged"] == 3 * COUNT


def test_a_model_that_refuses_nothing_is_an_error_with_advice(make: Make) -> None:
    """One-sided answers stop the fit after they are judged, and say what to add."""
    with pytest.raises(TooFewPrompts, match="--refused"):
        make(planted=Planted(refuses={TOPIC: -1.5, HARM: -1.5, PLAIN: -1.5})).run()


def test_residuals_that_are_no_numbers_stop_the_fit(make: Make) -> None:
    """NaN from the model is named by layer; it never becomes a vector."""
    with pytest.raises(CaptureError, match="layer 2 are not finite"):
        make(planted=Planted(not_finite="strike number 3")).run()


def test_without_safety_prompts_there_is_no_gate_and_the_card_says_so(make: Make) -> None:
    """The free profile is the default, and what is unknown is named."""
    fitted = make(safety=False)
    saved = fitted.run()
    assert saved.manifest.profile("topics").gate is None
    assert not saved.manifest.probes
    card = (fitted.bundle / "CARD.md").read_text("utf-8")
    assert "without --safety" in card
    assert "nothing is known of harmful ones" in card.replace("\n", " ")


def test_induction_raises_topic_refusals_and_a_gate_spares_general_prompts(make: Make, tmp_path: Path) -> None:
    """Fig. 4 of the paper: topic and general refusals by α; the gated profile leaves general prompts alone."""
    planted = Planted(refuses={TOPIC: 1.0, HARM: 1.6, "trade": -0.8, PLAIN: -1.0})
    fitted = make(replace(SMALL, purpose=Purpose.BOTH), planted)
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


@pytest.mark.parametrize("preset", [TopicPreset.PAPER_CHINA, TopicPreset.PAPER_EXTENDED])
def test_a_preset_knows_its_models_and_lists_them_for_others(preset: TopicPreset) -> None:
    """Table 1's constants for the models it has; anything else is an error that names them."""
    for known in PAPER_MODELS:
        fingerprint = {"architecture": known.architecture, "hidden_size": known.width, "layers": known.layers}
        if preset not in known.doses:
            with pytest.raises(UnknownPreset, match="Qwen3-Next-80B-A3B-Thinking"):
                topic_settings(preset, model=known.name, fingerprint=fingerprint)
            continue
        settings = topic_settings(preset, model=f"models/{known.name.lower()}", fingerprint=fingerprint)
        assert settings.doses == known.doses[preset]
        assert settings.is_literal
        assert not settings.repositions
        assert settings.ridge.value == 1e-2
        assert (settings.max_tokens == 8192) == known.thinks
        with pytest.raises(UnknownPreset, match="this model has"):
            topic_settings(preset, model=known.name, fingerprint={**fingerprint, "layers": 12})
    with pytest.raises(UnknownPreset, match="top 16, α -0.15" if "extended" in preset else "top 4, α -0.75"):
        topic_settings(preset, model="llama", fingerprint={})


def test_given_doses_are_taken_as_they_are(make: Make) -> None:
    """As a preset gives them: one configuration a method, measured but not searched for, and said in the report."""
    doses = {Method.WRMD: Dose(count=2, alpha=-2.0), Method.MD: Dose(count=1, alpha=-2.0)}
    settings = replace(SMALL, preset=TopicPreset.PAPER_EXTENDED, doses=doses, methods=tuple(doses), has_gate=False)
    fitted = make(settings)
    saved = fitted.run()
    found = fitted.stage("finder")
    assert [(one["method"], len(one["layers"]), one["alpha"]) for one in found["candidates"]] == [
        ("wrmd", 2, -2.0),
        ("md", 1, -2.0),
    ]
    assert {edit.name for edit in saved.manifest.edits} == {"wrmd-comply", "md-comply"}
    assert LAYERS_NOTE in (fitted.bundle / "CARD.md").read_text("utf-8").replace("\n", " ")


def test_induction_alone_needs_no_finder_and_names_its_default(make: Make, tmp_path: Path) -> None:
    """Nothing is removed: the bundle holds refuse edits only, and its default profile induces."""
    fitted = make(replace(SMALL, purpose=Purpose.INDUCE, methods=(Method.MD,), counts=(1,)), safety=False)
    path = tmp_path / "induced.txt"
    path.write_text("\n".join(prompts("trade", COUNT)), "utf-8")
    fitted.sources[Role.INDUCED] = [str(path)]
    saved = fitted.run()
    assert saved.manifest.default_profile == "topics-induce"
    assert {edit.purpose for edit in saved.manifest.edits} == {"refuse"}
    assert not (fitted.fit.work / "finder.json").exists()
    assert "Induced refusals" in (fitted.bundle / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--refused", "no-such.txt"], "neither a file nor a part"),
        (["--refused", "ccp_sensitive/sampled_test"], "may not be fitted on"),
        (["--preset", "paper-extended"], "has no constants for"),
        (["--judge", "llm"], "go together"),
        (["--judge", "keyword", "--judge-url", "u", "--judge-model", "m"], "go together"),
        (["--method", "pca"], "methods: md, wmd, rmd, wrmd"),
        (["--lambda", "0"], "above 0"),
        (["--engine", "dtype=float32"], "value as JSON"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    tiny_path: Path, tmp_path: Path, given: list[str], told: str
) -> None:
    """Mistakes of the caller end with status 1 and a sentence, before any engine is started."""
    from typer.testing import CliRunner

    from steering.fit.cli import app

    work = ["--model", str(tiny_path), "--work", str(tmp_path / "work"), "--bundle", str(tmp_path / "bundle")]
    found = CliRunner().invoke(app, ["topics", *work, *given])
    assert found.exit_code == 1
    assert told in " ".join(found.output.split())
    assert not (tmp_path / "bundle").exists()
