"""Everyday instructions: the project's own, and those of a data set that are dealt to calibration by their text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steering.fit import prompts
from steering.fit.activations import LoadedModel
from steering.fit.control import Fit, Settings
from steering.fit.datasets import DataDirectory, Deduplicated, Record, held_records, load_parts, normalised, parts_for
from steering.fit.everyday import EVERYDAY
from steering.fit.probes import Linear
from steering.fit.probing import _telling_plain
from steering.fit.prompts import EVERYDAY_PARTS, Kind, calibration_prompts, fitting_prompts
from steering.fit.sources import Label, Use


def _record(part: tuple[str, str], number: int) -> Record:
    text = f"Tell me something nice about the number {number}."
    return Record(key=f"{part[0]}/{part[1]}/{number}", dataset=part[0], part=part[1], prompt=text, label=Label.BENIGN)


class _Repeating:
    """Stands in for `fit_records`: a part that has no row left for calibration, and one that has."""

    def __call__(self, _directory: object, parts: object, use: Use = Use.FIT, **_: object) -> Deduplicated:
        wanted = set(parts)  # type: ignore[call-overload]
        everyday = [_record(EVERYDAY_PARTS[0], number) for number in range(40)] if use is Use.FIT else []
        other = [_record(("gsm8k", "train"), number) for number in ((50, 51) if use is Use.FIT else (60, 61))]
        found = (*everyday, *other)
        return Deduplicated(records=tuple(record for record in found if (record.dataset, record.part) in wanted))


def test_everyday_prompts_are_dealt_to_either_use_and_never_to_both(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About half of them calibrates, as a group of its own that counts as plain; the rest is fitted on."""
    monkeypatch.setattr(prompts, "fit_records", _Repeating())
    directory = DataDirectory(path=tmp_path)
    fit = Fit(
        loaded=tiny, directory=directory, work=tmp_path, settings=Settings(has_templates=False), say=lambda _: None
    )
    fitting, calibrating = fitting_prompts(fit), calibration_prompts(fit)
    fitted = {prompt.key for prompt in fitting.items if prompt.source == "cast_conditions/harmless"}
    dealt = [prompt for prompt in calibrating.items if prompt.source == "cast_conditions/harmless"]
    assert len(fitted) + len(dealt) == 40
    assert not fitted & {prompt.key for prompt in dealt}
    assert 10 < len(dealt) < 30
    assert {(prompt.group, prompt.kind) for prompt in dealt} == {("everyday", Kind.PLAIN)}
    assert {prompt.group for prompt in calibrating.items} == {"everyday", "plain"}


def test_the_plain_class_is_asked_by_the_group_that_needs_most_and_leaves_its_weights() -> None:
    """Its bias alone rises, so far that the group told worst is missed as rarely as is allowed."""
    groups = np.array(["plain"] * 50 + ["everyday"] * 50 + ["harmful"] * 2)
    scores = np.zeros((102, 2))
    scores[:50, 1] = np.linspace(1.0, 2.0, 50)
    scores[50:100, 1] = np.linspace(-3.0, 1.0, 50)
    scores[100:, 1] = (-9.0, -1.0)
    head = Linear(np.ones((2, 3)), np.array([0.5, -0.5]))
    raised, told = _telling_plain(head, scores, groups, 0.02)
    assert raised.bias[0] == head.bias[0]
    assert raised.bias[1] - head.bias[1] == pytest.approx(told["bias_raised"])
    assert raised.weight is head.weight
    assert told["groups"]["everyday"] == {"n": 50, "told before": 0.26, "told": 0.98}
    assert told["groups"]["plain"]["told"] == 1.0
    assert told["groups"]["harmful"]["told"] == 0.5, "what else it leaves alone is said"
    kept, told = _telling_plain(head, scores[:50], groups[:50], 0.02)
    assert told["bias_raised"] == 0.0
    assert kept.bias.tolist() == head.bias.tolist(), "a class that misses nothing is left as it was fitted"


def test_the_project_s_own_instructions_are_all_different() -> None:
    """They are told apart as deduplication does."""
    assert len({normalised(text) for text in EVERYDAY}) == len(EVERYDAY) >= 200


@pytest.mark.needs_data
def test_no_data_set_holds_one_of_the_project_s_own_instructions(data_directory: Path) -> None:
    """Nothing that is for testing or calibration is fitted on under another name."""
    directory = DataDirectory(path=data_directory)
    records = held_records(directory)
    for use in (Use.FIT, Use.CALIBRATE):
        records += load_parts(directory, list(parts_for(use)), use)
    assert not {normalised(record.prompt) for record in records} & {normalised(text) for text in EVERYDAY}
