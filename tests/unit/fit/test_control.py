"""The control fit: choice of doses and layers, resumable stages, and a whole run on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.bundle import load_bundle
from steering.errors import OperatorError
from steering.fingerprint import fingerprint_of
from steering.fit import control, doses
from steering.fit.activations import LoadedModel
from steering.fit.categories import CATEGORIES, POLITICAL, SAFETY
from steering.fit.control import RESPOND, Fit, Settings, Variant, categorical
from steering.fit.control_bundle import CONTROL_PROFILE, P1_PROFILE, PROFILE, fit_directions
from steering.fit.datasets import DataDirectory, Deduplicated, Record
from steering.fit.doses import _best_layer, _choose, edit_name, of_common_length, well_formed
from steering.fit.sources import Label, Use

SMALL = Settings(most=6, calibration=4, ranged=4, multiples=(0.5, 1.0), strengths=(1.0,))


def _row(multiple: float, effect: float) -> dict[str, Any]:
    return {"multiple": multiple, "coefficient": multiple * 10, "effect": effect}


def _layer(layer: int, comply: float, refuse: float, coefficient: float) -> dict[str, Any]:
    chosen = {
        sign: {"effect": effect, "coefficient": coefficient}
        for sign, effect in (("comply", comply), ("refuse", refuse))
    }
    return {"layer": layer, "residual_norm": 10.0, "chosen": chosen, "score": comply + refuse}


def _record(dataset: str, part: str, number: int, label: Label, category: str | None = None) -> Record:
    prompt = f"{label} {category or ''} {dataset} number {number}?"
    return Record(
        key=f"{dataset}/{part}/{number}", dataset=dataset, part=part, prompt=prompt, label=label, category=category
    )


def _records() -> list[Record]:
    records = [
        _record("coconot", "eval", number, Label.NONCOMPLIANCE, name) for name in CATEGORIES for number in range(3)
    ]
    records += [_record("catqa", "all", number, Label.HARMFUL) for number in range(8)]
    records += [_record("deccp", "censored", number, Label.SENSITIVE) for number in range(3)]
    records += [_record("or_bench_borderline", "all", number, Label.BORDERLINE) for number in range(8)]
    records += [_record("gsm8k", "train", number, Label.BENIGN) for number in range(8)]
    return records


@dataclass(frozen=True)
class FakeDirectory:
    """Two prompts of every part, whatever is asked."""

    def load(self, name: str, part: str, _use: Use) -> list[Record]:
        return [_record(name, part, number, Label.BORDERLINE) for number in range(2)]


@pytest.fixture
def fit(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A fit of the tiny random model on made-up prompts."""

    def chosen(_directory: object, parts: object, _use: Use = Use.FIT) -> Deduplicated:
        wanted = set(parts)  # type: ignore[call-overload]
        return Deduplicated(records=tuple(record for record in _records() if (record.dataset, record.part) in wanted))

    def held(_directory: object) -> list[Record]:
        names = [("xstest", "safe"), ("xstest", "unsafe"), ("coconot", "contrast"), ("gsm8k", "test")]
        names += [("jailbreakbench", "benign"), ("jailbreakbench", "harmful"), ("or_bench_borderline", "all")]
        return [_record(*name, number, Label.BORDERLINE) for name in names for number in range(2)]

    monkeypatch.setattr(control, "fit_records", chosen)
    monkeypatch.setattr(doses, "held_records", held)
    directory: Any = FakeDirectory()
    return Fit(loaded=tiny, directory=directory, work=tmp_path / "work", settings=SMALL, say=lambda _line: None)


def test_the_smallest_dose_that_reaches_the_target_is_taken() -> None:
    """Else the one with the largest effect; effect counts malformed answers against a dose."""
    rows = [_row(0.5, 0.4), _row(1.0, 0.96), _row(2.0, 1.0)]
    assert _choose(rows, 0.95)["multiple"] == 1.0
    assert _choose(rows, 1.1)["multiple"] == 2.0


def test_the_layer_with_the_best_control_wins_and_ties_go_to_the_gentler_one() -> None:
    """Effects are compared to two places, then the size of the addition beside the residual."""
    assert _best_layer([_layer(1, 0.9, 0.5, 3.0), _layer(2, 0.9, 0.9, 9.0)]) == 2
    assert _best_layer([_layer(1, 0.901, 0.9, 9.0), _layer(2, 0.9, 0.9, 3.0)]) == 2


def test_answers_that_run_in_circles_or_begin_with_text_are_not_well_formed(tiny: LoadedModel) -> None:
    """A run of four tokens three times is a circle; the first token must be a decision."""
    assert tiny.respond is not None
    good, circle, text = [tiny.respond, 30, 31, 32, 33], [tiny.respond, *[40, 41, 42, 43] * 3], [40, 41]
    rate = well_formed(tiny, [good, circle, text, []])
    assert (rate.count, rate.n) == (1, 4)


def test_prompts_of_common_length_come_first() -> None:
    """They are answered in one batch."""
    assert of_common_length([[1], [1, 2], [3, 4], [1, 2, 3]], 2) == [[1, 2], [3, 4]]


def test_a_category_s_direction_is_the_unit_difference_of_its_means() -> None:
    """Of its own variant, at its own layer."""
    means = {
        f"{Variant.HEADER}/{SAFETY}": torch.tensor([[0.0, 0.0], [3.0, 5.0]], dtype=torch.float64),
        f"{Variant.HEADER}/{RESPOND}": torch.tensor([[9.0, 9.0], [0.0, 1.0]], dtype=torch.float64),
    }
    direction, gap = categorical(means, Variant.HEADER, SAFETY, 1, Settings())
    assert direction.tolist() == pytest.approx([0.6, 0.8])
    assert gap == pytest.approx(5.0)


def test_a_whole_fit_writes_a_bundle_that_loads_and_names_every_edit(fit: Fit, tmp_path: Path) -> None:
    """From prompts to manifest: both variants, six categories, the control, the fingerprint, a picture, a card."""
    saved = fit_directions(fit, tmp_path / "bundle", name="tiny", version="1")
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.digest == saved.digest
    assert len(loaded.edits) == 2 * 2 * len(CATEGORIES) + 1
    assert loaded.manifest.model == fingerprint_of(fit.loaded.path)
    assert loaded.manifest.default_profile == PROFILE
    profiles = {profile.name: profile for profile in loaded.manifest.profiles}
    assert set(profiles) == {PROFILE, P1_PROFILE, CONTROL_PROFILE}
    assert profiles[PROFILE].comply[POLITICAL] == edit_name("comply", POLITICAL) == "comply-political"
    assert profiles[P1_PROFILE].refuse[SAFETY] == "p1-refuse-requests-with-safety-concerns"
    assert set(profiles[CONTROL_PROFILE].comply.values()) == {"random"}
    for name, edit in loaded.edits.items():
        bias = edit.layers[0].bias.item()
        assert bias < 0 if "comply" in name else bias > 0
    comply, control_edit = loaded.edits[edit_name("comply", SAFETY)], loaded.edits["random"]
    assert control_edit.layers[0].bias.item() == pytest.approx(-comply.layers[0].bias.item())
    assert {category.token_id for category in loaded.manifest.categories} == set(fit.loaded.categories.values())
    report = json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))
    card = (tmp_path / "bundle" / "CARD.md").read_text(encoding="utf-8")
    dose = report["doses"][Variant.HEADER]["categories"][POLITICAL]["comply"]["coefficient"]
    assert f"| {PROFILE} | {POLITICAL} | {dose:.1f} |" in card
    assert (tmp_path / "bundle" / "layer_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_keeps_every_stage_and_gives_the_same_bundle(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed again for the same weights and settings."""
    first = fit_directions(fit, tmp_path / "first", name="tiny", version="1")

    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a kept stage was run again")

    for module, name in (
        (control, "last_residuals"),
        (control, "fit_records"),
        (doses, "last_residuals"),
        (doses, "decide"),
        (doses, "greedy"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    assert fit_directions(fit, tmp_path / "second", name="tiny", version="1").digest == first.digest


def test_other_settings_do_not_reuse_a_stage(fit: Fit) -> None:
    """A stage's file says what it was made with."""
    made = iter(({"value": 1}, {"value": 2}))
    assert fit.stage("x", lambda: next(made))["value"] == 1
    assert fit.stage("x", lambda: next(made))["value"] == 1
    other = Fit(
        loaded=fit.loaded, directory=fit.directory, work=fit.work, settings=Settings(seed=1), say=lambda _line: None
    )
    assert other.stage("x", lambda: next(made))["value"] == 2


def test_a_category_without_prompts_stops_the_fit(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than giving a direction made of nothing."""
    monkeypatch.setattr(control, "fit_records", lambda *_arguments: Deduplicated(records=()))
    with pytest.raises(OperatorError, match="no prompts"):
        fit_directions(fit, fit.work / "bundle", name="tiny", version="1")


@pytest.mark.needs_data
def test_fit_and_calibration_prompts_of_the_control_fit_are_disjoint_and_none_is_held(data_directory: Path) -> None:
    """For the very parts the fit names: what chooses the dose was not fitted on, and what is reported on is neither."""
    from steering.fit.datasets import fit_records, held_records, normalised

    directory = DataDirectory(path=data_directory)
    parts = (*control.REFUSED_PARTS, *control.CONTRAST_PARTS, *control.PLAIN_PARTS)
    fitted = {normalised(record.prompt) for record in fit_records(directory, parts).records}
    calibrated = {normalised(record.prompt) for record in fit_records(directory, parts, Use.CALIBRATE).records}
    held = {normalised(record.prompt) for record in held_records(directory)}
    assert min(len(fitted), len(calibrated), len(held)) > 500
    assert not fitted & calibrated
    assert not held & (fitted | calibrated)
