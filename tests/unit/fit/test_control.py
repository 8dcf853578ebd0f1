"""The control fit: presets, resumable stages, choices, and whole runs on a tiny random model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering.bundle import load_bundle
from steering.errors import OperatorError
from steering.fingerprint import fingerprint_of
from steering.fit import prompts
from steering.fit.ability import answer_loss, fed, of_common_length, well_formed
from steering.fit.activations import LoadedModel
from steering.fit.categories import CATEGORIES, PLAIN, POLITICAL, SAFETY
from steering.fit.comparison import graded_shares, sign_test
from steering.fit.control import (
    PAPER_LAYER,
    PAPER_THRESHOLD,
    QUICK,
    Fit,
    Preset,
    Settings,
    Variant,
    open_fit,
    preset_settings,
)
from steering.fit.control_bundle import PROFILE
from steering.fit.datasets import DataDirectory, Deduplicated
from steering.fit.doses import _smallest, best_layer
from steering.fit.families import Family, another_category, edit_name
from steering.fit.low_rank import Covariance, Training
from steering.fit.openings import token_openings
from steering.fit.pipeline import Stage, fit_control
from steering.fit.sources import Use
from steering.fit.vectors import RESPOND, categorical
from steering.gate import rule
from steering.plan import Decision, GateOrder
from steering.terms import Edit, added_direction
from tests.unit.fit.made_up import SMALL, Chosen, made_up_records, on_made_up_prompts, small_fit


@pytest.fixture(scope="module")
def fitted(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """One that was run to the end; its bundle is in `bundle` beside its work folder."""
    found = small_fit(tiny, tmp_path_factory.mktemp("fitted"), SMALL)
    with pytest.MonkeyPatch.context() as monkeypatch:
        on_made_up_prompts(monkeypatch)
        assert fit_control(found, found.work.parent / "bundle", name="tiny", version="1") is not None
    return found


def test_a_whole_fit_writes_a_bundle_that_loads_with_probe_gates_and_report(fitted: Fit) -> None:
    """From prompts to manifest: probe, profiles with gates, the fingerprint, pictures, a report and a card."""
    fit, bundle = fitted, fitted.work.parent / "bundle"
    loaded = load_bundle(bundle)
    assert loaded.manifest.model == fingerprint_of(fit.loaded.path)
    assert loaded.manifest.default_profile == PROFILE
    profiles = {profile.name: profile for profile in loaded.manifest.profiles}
    assert {
        PROFILE, "low-rank", "p1-categorical", "pooled", "null-space", "random-control", "random-category",
    } <= set(profiles)  # fmt: skip
    assert profiles["p1-categorical"].refuse[SAFETY] == "p1-refuse-requests-with-safety-concerns"
    hard = profiles["p1-categorical"].gate
    assert hard is not None
    assert hard.comply_below == hard.refuse_above
    assert hard.category_source == "refusal_tokens"
    turned = profiles["random-category"].refuse
    assert all(edit_name("refuse", name) != key for name, key in turned.items())
    probe = loaded.probes["refusal"]
    assert probe.categories == (*CATEGORIES, PLAIN)
    default = profiles[PROFILE]
    assert all(PLAIN not in profile.comply for profile in profiles.values()), "plain prompts are not edited to comply"
    assert default.refuse.get(PLAIN) == default.refuse.get(SAFETY)
    record = loaded.manifest.probes[0]
    assert [point.name for point in record.operating_points] == ["youden", "fpr-5"]
    assert "weigh" in record.provenance["imbalance"]["how"]
    assert record.calibration["bins"]
    named = {category.name: category.token_id for category in loaded.manifest.categories}
    assert named == {**fit.loaded.categories, PLAIN: None}
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert report["probe"]["roc"]
    assert report["probe"]["histograms"]["harmful"]["n"] == 6
    assert report["gate"]["families"]["category"]["frontier"]
    assert report["head"]["confusion"]
    told = report["head"]["plain"]
    assert told["groups"]["plain"]["told"] >= 1.0 - told["missed_at_most"], "the plain class may miss few of its own"
    assert report["gate"]["families"]["category"]["plain_edited"]["plain"] <= fit.settings.plain_edited
    assert len(report["cosines"]["cosines"]) == len(report["cosines"]["names"])
    assert "identity" not in json.dumps(report)
    card = (bundle / "CARD.md").read_text(encoding="utf-8")
    assert f"| `{PROFILE}` (default) |" in card
    assert "Its plain class had its bias raised by" in card
    assert all((fit.work / f"{stage}.png").is_file() for stage in Stage if stage not in ("bundle", "report"))
    assert (bundle / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_keeps_every_stage_and_gives_the_same_bundle(
    fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed again for the same model and settings; other thresholds run the late stages only."""
    on_made_up_prompts(monkeypatch)
    folder = fitted.work.parent
    first = load_bundle(folder / "bundle")
    lines: list[str] = []
    second = fit_control(small_fit(fitted.loaded, folder, SMALL, lines), tmp_path / "second", name="tiny", version="1")
    assert second is not None
    assert first.digest == second.digest
    assert not [line for line in lines if line.endswith("running")]
    lines.clear()
    shutil.copytree(folder, tmp_path / "copy")
    other = small_fit(fitted.loaded, tmp_path / "copy", replace(SMALL, safety_margin=0.5), lines)
    assert fit_control(other, tmp_path / "third", name="tiny", version="1", until=Stage.GATE) is None
    ran = {line.removesuffix(": running") for line in lines if line.endswith("running")}
    assert ran == {"gate"}


def test_a_run_stops_after_the_stage_it_is_told_and_goes_on_later(fit: Fit, tmp_path: Path) -> None:
    """`--stage probe` leaves the probe's files and picture, and no bundle."""
    assert fit_control(fit, tmp_path / "bundle", name="t", version="1", until=Stage.PROBE) is None
    assert (fit.work / "probe.json").is_file()
    assert (fit.work / "probe.png").is_file()
    assert not (fit.work / "head.json").exists()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("budget", [1e9, -1e9], ids=["within budgets", "beyond budgets"])
def test_the_paper_s_preset_is_used_as_it_is_where_the_layer_is_given(fit: Fit, tmp_path: Path, budget: float) -> None:
    """Layer clipped to the tiny model: fixed doses of +4 and -6, a hard sign at 0.535, AdamW of 1e-5, ε 1e-4. What the
    doses do to answers changes none of it; the bundle says where they are beyond what a fit of our own allows.
    """
    settings = replace(
        preset_settings(Preset.PAPER, layer=1),
        **{key: value for key, value in QUICK.items() if key not in ("trained", "multiples")},
        categories=(SAFETY, POLITICAL),
        trained=3,
        most_spoiled=1.0,
        divergence_budget=budget,
        loss_budgets=(budget, budget),
    )
    paper = small_fit(fit.loaded, tmp_path / "paper", settings)
    saved = fit_control(paper, tmp_path / "bundle", name="paper", version="1")
    assert saved is not None
    assert saved.probes["refusal"].layer == 1
    assert saved.edits["p1-refuse-political"].layers[0].bias.item() == pytest.approx(4.0, rel=1e-5)
    trained = json.loads((paper.work / "low_rank.json").read_text("utf-8"))
    low_rank = saved.edits["refuse-low-rank"].layers[0].bias.item()
    assert low_rank == pytest.approx(4.0 * trained["length"], rel=1e-4)
    assert saved.edits["p1-comply-political"].layers[0].bias.item() == pytest.approx(-6.0, rel=1e-5)
    for profile in saved.manifest.profiles:
        assert profile.gate is not None
        assert profile.gate.comply_below == profile.gate.refuse_above == PAPER_THRESHOLD
    record = saved.manifest.edit("p1-comply-political")
    assert record.strength.measured.startswith("largest strength" if budget > 0 else "not certified: a fixed dose")
    assert record.strength.maximum >= 1.0
    provenance = saved.manifest.edit("refuse-low-rank").provenance
    assert (provenance["training"]["rate"], provenance["training"]["epochs"]) == (1e-5, 5)
    assert (provenance["added"], provenance["scale"]) == (1e-4, 1.0)
    compared = json.loads((paper.work / "compare.json").read_text("utf-8"))
    assert compared["rounds"] == [], "nothing that the paper has not is chosen"
    assert compared["winner"] == {"comply": "category", "refuse": "category", "is_graded": False}
    assert not json.loads((paper.work / "probe.json").read_text("utf-8"))["scaling"]["is_applied"]
    sources = json.loads((paper.work / "vectors.json").read_text("utf-8"))["sources"]
    assert set(sources[f"p1/{SAFETY}"]) == {"coconot/eval"}
    assert set(sources[f"p1/{RESPOND}"]) == {"coconot/pref"}
    fitting = prompts.fitting_prompts(paper)
    for source, wanted in (("coconot/eval", False), ("deccp/censored", True)):
        # A category that CoCoNot lacks keeps its own prompts; another one loses those of other sets.
        of_other_sets = [index for index, prompt in enumerate(fitting.items) if prompt.source == "deccp/censored"]
        mixed = [index for index, prompt in enumerate(fitting.items) if prompt.source == source] + of_other_sets
        assert (of_other_sets[0] in prompts.p1_prompts(paper, fitting, mixed)) == wanted


def test_the_wrong_category_is_never_the_right_one(fit: Fit) -> None:
    """Every category gets another one's edits, each is given once; plain prompts get those of the default's other."""
    family = Family(
        refuse={name: f"refuse {name}" for name in (*fit.categories, PLAIN)},
        comply={name: f"comply {name}" for name in fit.categories},
    )
    family.refuse[PLAIN] = family.refuse[SAFETY]
    wrong = another_category(fit, family)
    assert not any(wrong.refuse[name] == family.refuse[name] for name in family.refuse)
    assert sorted(wrong.comply.values()) == sorted(family.comply.values())
    assert wrong.refuse[PLAIN] == wrong.refuse[SAFETY]
    assert wrong == another_category(fit, family)


def test_other_prompts_make_every_stage_anew(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of them, from the same sets: counts are alike, and what was made of the others is not kept."""
    assert fit_control(fit, tmp_path / "bundle", name="t", version="1", until=Stage.PROBE) is None
    before = json.loads((fit.work / "probe.json").read_text("utf-8"))
    moved = [replace(record, prompt=record.prompt.replace("number", "figure")) for record in made_up_records(0)]

    def others(_directory: object, parts: Any, use: Use = Use.FIT, **_: object) -> Deduplicated:
        if use is Use.CALIBRATE:
            return Chosen()(_directory, parts, use)
        wanted = set(parts)
        return Deduplicated(records=tuple(record for record in moved if (record.dataset, record.part) in wanted))

    monkeypatch.setattr(prompts, "fit_records", others)
    lines: list[str] = []
    again = Fit(loaded=fit.loaded, directory=fit.directory, work=fit.work, settings=fit.settings, say=lines.append)
    assert fit_control(again, tmp_path / "bundle", name="t", version="1", until=Stage.PROBE) is None
    ran = {line.removesuffix(": running") for line in lines if line.endswith("running")}
    assert {"activations", "openings", "vectors", "probe"} <= ran
    assert json.loads((fit.work / "probe.json").read_text("utf-8"))["area"] != before["area"]


def test_presets_hold_the_paper_s_constants_and_give_way_to_choices() -> None:
    """P1's numbers, one by one; None chooses nothing."""
    paper = preset_settings(Preset.PAPER, layer=None)
    assert (paper.layer, paper.tau, paper.top_k, paper.threshold) == (18, 1e-3, 200, 0.535)
    assert paper.doses == (4.0, -6.0)
    assert paper.training == Training(rate=1e-5, epochs=5, batch=1, clip=1.0, divergence=1.0, spread=0.01)
    assert (paper.covariance, paper.epsilon, paper.is_scaled) == (Covariance.PAPER, 1e-4, False)
    assert (paper.trained, paper.covariance_prompts) == (379, 379)
    assert paper.p1_sources == ("coconot/eval", "coconot/pref")
    assert paper.without == ("advbench", "harmfulqa"), "sets of the paper's table are not fitted on"
    assert preset_settings(Preset.PAPER, without=("catqa",)).without == ("advbench", "harmfulqa", "catqa")
    assert preset_settings(Preset.PAPER, layer=3).layer == 3
    auto = preset_settings(Preset.AUTO)
    assert (auto.layer, auto.threshold, auto.doses) == (None, None, None)


def test_the_paper_s_layer_needs_nineteen_layers_and_the_error_names_the_option(
    tiny_path: Path, tmp_path: Path
) -> None:
    """A model of three blocks: what was needed, what there is, what to do."""
    with pytest.raises(OperatorError, match=rf"layer {PAPER_LAYER} \(the paper's\) needs a model of 19.*--layer"):
        open_fit(tiny_path, tmp_path, tmp_path, preset_settings(Preset.PAPER))
    opened = open_fit(tiny_path, tmp_path, tmp_path, preset_settings(Preset.PAPER, layer=2), dtype=torch.bfloat16)
    assert opened.loaded.model.dtype == torch.bfloat16


def test_a_stage_depends_on_its_own_settings_and_on_earlier_results(fit: Fit) -> None:
    """Others leave it alone; tensors come back as they were."""
    made = iter(({"value": 1, "tensors": {"x": torch.ones(2)}}, {"value": 2}, {"value": 3}))
    first = fit.stage("x", lambda: next(made), of=("most",))
    assert first["value"] == fit.stage("x", lambda: next(made), of=("most",))["value"] == 1
    assert fit.tensors("x")["x"].tolist() == [1.0, 1.0]

    def with_settings(settings: Settings) -> Fit:
        return Fit(loaded=fit.loaded, directory=fit.directory, work=fit.work, settings=settings, say=lambda _line: None)

    assert with_settings(replace(SMALL, held=9)).stage("x", lambda: next(made), of=("most",))["value"] == 1
    assert with_settings(replace(SMALL, most=9)).stage("x", lambda: next(made), of=("most",))["value"] == 2
    earlier = {"digest": "another"}
    assert fit.stage("x", lambda: next(made), of=("most",), after=[earlier])["value"] == 3


def test_a_category_without_prompts_stops_the_fit(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than giving a direction made of nothing; the message names it."""

    def without(_directory: object, parts: Any, use: Use = Use.FIT, **_: object) -> Deduplicated:
        left = Chosen()(_directory, parts, use).records
        return Deduplicated(records=tuple(record for record in left if record.category != CATEGORIES[0]))

    monkeypatch.setattr(prompts, "fit_records", without)
    with pytest.raises(OperatorError, match=CATEGORIES[0]):
        fit_control(fit, fit.work / "bundle", name="tiny", version="1")
    monkeypatch.setattr(prompts, "fit_records", lambda *_arguments, **_: Deduplicated(records=()))
    with pytest.raises(OperatorError, match="no prompts"):
        fit_control(fit, fit.work / "bundle", name="tiny", version="1")


def test_the_smallest_dose_that_reaches_the_target_is_taken() -> None:
    """Else the one with the largest effect; effect counts malformed answers against a dose."""
    rows = [{"multiple": 0.5, "effect": 0.4}, {"multiple": 1.0, "effect": 0.96}, {"multiple": 2.0, "effect": 1.0}]
    assert _smallest(rows, 0.95)["multiple"] == 1.0
    assert _smallest(rows, 1.1)["multiple"] == 2.0


def test_of_layers_that_control_as_well_the_one_that_spoils_least_is_taken() -> None:
    """Not the gentlest of all, nor the very best of equals; the last fifth and early layers may be out."""

    def row(layer: int, score: float, loss: float) -> dict[str, Any]:
        return {"layer": layer, "score": score, "loss_added": loss}

    swept = {"layers": [row(0, 1.4, 0.1), row(1, 1.85, 0.9), row(2, 1.8, 0.4), row(3, 1.2, 0.0), row(4, 2.0, 0.0)]}
    assert best_layer(swept, Settings()) == 2
    assert best_layer(swept, Settings(), at_least=3) == 3
    assert best_layer(swept, Settings(layer=0)) == 0


def test_answers_that_run_in_circles_or_begin_with_text_are_not_well_formed(tiny: LoadedModel) -> None:
    """A run of four tokens three times is a circle, and so are a few tokens in any order; the first token must be a
    decision where the model has tokens.
    """
    assert tiny.respond is not None
    good, circle, text = [tiny.respond, 30, 31, 32, 33], [tiny.respond, *[40, 41, 42, 43] * 3], [40, 41]
    stutter = [tiny.respond, 40, 41, 41, 40, 40, 41, 40, 41, 40, 40, 40, 41, 41, 41]
    rate = well_formed(token_openings(tiny), [good, circle, text, [], stutter])
    assert (rate.count, rate.n) == (1, 5)


def test_prompts_of_common_length_come_first() -> None:
    """They are answered in one batch."""
    assert of_common_length([[1], [1, 2], [3, 4], [1, 2, 3]], 2) == [[1, 2], [3, 4]]


def test_the_loss_of_an_answer_is_that_of_its_tokens_after_the_decision(tiny: LoadedModel) -> None:
    """By hand, unsteered; an edit on all positions from the last prompt token on changes it."""
    prompt, answer = tiny.prompts(["what is tea"])[0], [12, 40, 41, 42]
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    scores = torch.log_softmax(logits, dim=-1)
    by_hand = -sum(float(scores[len(prompt) - 1 + place, answer[place]]) for place in (1, 2, 3)) / 3
    assert answer_loss(tiny, [(prompt, answer)]) == pytest.approx(by_hand, rel=1e-5)
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    edit = Edit(name="e", layers=(added_direction(layer=1, direction=direction, coefficient=5.0),))
    other = answer_loss(tiny, [(prompt, answer)], edit)
    assert other != pytest.approx(by_hand, rel=1e-3)
    both = fed(tiny, [(prompt, answer), (prompt, answer)], [edit, None])
    assert both.loss == pytest.approx((other + by_hand) / 2, rel=1e-4)
    assert both.greedy[1].tolist() == scores[len(prompt) : len(prompt) + 3].argmax(dim=-1).tolist()


def test_a_category_s_direction_is_the_unit_difference_of_its_means() -> None:
    """Of its own variant, at its own layer."""
    means = {
        f"{Variant.HEADER}/{SAFETY}": torch.tensor([[0.0, 0.0], [3.0, 5.0]], dtype=torch.float64),
        f"{Variant.HEADER}/{RESPOND}": torch.tensor([[9.0, 9.0], [0.0, 1.0]], dtype=torch.float64),
    }
    direction, gap = categorical(means, Variant.HEADER, SAFETY, 1, Settings())
    assert direction.tolist() == pytest.approx([0.6, 0.8])
    assert gap == pytest.approx(5.0)


def test_graded_shares_are_those_of_the_gate() -> None:
    """On either side of the band the reference gate's own share; inside it nothing."""
    order = GateOrder(profile="p", comply_below=0.3, refuse_above=0.8, is_graded=True)
    probabilities = np.array([0.01, 0.15, 0.3, 0.5, 0.8, 0.9, 0.99])
    found = graded_shares(probabilities, 0.3, 0.8)
    for probability, share in zip(probabilities, found, strict=True):
        ruling = rule(torch.tensor([float(np.log(probability / (1 - probability))), 0.0]), order, ("c",))
        assert ruling is not None
        expected = 0.0 if ruling.decision is Decision.ABSTAIN else ruling.share
        assert share == pytest.approx(expected, abs=1e-5)


def test_a_sign_test_is_one_sided_and_silent_without_differences() -> None:
    """9 of 10: 11/1024; nothing to tell apart: 1."""
    assert sign_test(9, 1) == pytest.approx(11 / 1024)
    assert sign_test(1, 9) > 0.99
    assert sign_test(0, 0) == 1.0


@pytest.mark.needs_data
def test_fit_and_calibration_prompts_of_the_control_fit_are_disjoint_and_none_is_held(data_directory: Path) -> None:
    """For the very parts the fit names: what chooses the dose was not fitted on, and what is reported on is neither."""
    from steering.fit.datasets import fit_records, held_records, normalised

    directory = DataDirectory(path=data_directory)
    fitted = {normalised(record.prompt) for record in fit_records(directory, prompts.PARTS).records}
    calibrated = {normalised(record.prompt) for record in fit_records(directory, prompts.PARTS, Use.CALIBRATE).records}
    held_out = {normalised(record.prompt) for record in held_records(directory)}
    assert min(len(fitted), len(calibrated), len(held_out)) > 500
    assert not fitted & calibrated
    assert not held_out & (fitted | calibrated)
