"""Made-up prompts and a small control fit on them: seconds on a tiny random model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from steering.fit import held, prompts, vectors
from steering.fit.activations import LoadedModel
from steering.fit.categories import CATEGORIES
from steering.fit.control import QUICK, Fit, Preset, Settings, preset_settings
from steering.fit.datasets import DataDirectory, Deduplicated, Record
from steering.fit.low_rank import Training
from steering.fit.openings import token_openings
from steering.fit.sources import Label, Use

SMALL = replace(
    preset_settings(Preset.AUTO, **QUICK),
    most=6,
    calibration=4,
    ranged=4,
    held=2,
    training=Training(rate=1e-2, epochs=1, batch=4),
    # A random model's answers run in circles whatever is done to them, and its first tokens are anything.
    most_spoiled=1.0,
    divergence_budget=1e9,
    loss_budgets=(1e9, 1e9),
)


def made_up_record(dataset: str, part: str, number: int, label: Label, category: str | None = None) -> Record:
    """One of a set, with a text of its own."""
    return Record(
        key=f"{dataset}/{part}/{number}",
        dataset=dataset,
        part=part,
        prompt=f"{label} {category or ''} {dataset} number {number}?",
        label=label,
        category=category,
        answer="tea is made of tea and a knot is not made of tea at all" if label is Label.BENIGN else None,
    )


def made_up_records(offset: int) -> list[Record]:
    """Six of every kind a fit needs, numbered from `offset` on."""
    numbers = range(offset, offset + 6)
    records = [
        made_up_record("coconot", "eval", number, Label.NONCOMPLIANCE, name)
        for name in CATEGORIES
        for number in numbers
    ]
    records += [made_up_record("catqa", "all", number, Label.HARMFUL) for number in numbers]
    records += [made_up_record("deccp", "censored", number, Label.SENSITIVE) for number in numbers]
    records += [made_up_record("or_bench_borderline", "all", number, Label.BORDERLINE) for number in numbers]
    records += [made_up_record("coconot", "pref", number, Label.BORDERLINE) for number in numbers]
    records += [made_up_record("gsm8k", "train", number, Label.BENIGN) for number in numbers]
    return records


@dataclass(frozen=True)
class Chosen:
    """Stands in for `fit_records`: made-up records of the parts asked for, others for calibration."""

    def __call__(
        self, _directory: object, parts: Any, use: Use = Use.FIT, *, without: Collection[str] = ()
    ) -> Deduplicated:
        wanted = {part for part in parts if part[0] not in without}
        records = made_up_records(100 if use is Use.CALIBRATE else 0)
        return Deduplicated(records=tuple(record for record in records if (record.dataset, record.part) in wanted))


def made_up_held(_directory: object) -> list[Record]:
    """Stands in for `held_records`."""
    names = [("xstest", "safe"), ("xstest", "unsafe"), ("gsm8k", "test"), ("alphasteer_attacks", "aim")]
    return [made_up_record(*name, number, Label.BORDERLINE) for name in names for number in range(3)]


def on_made_up_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fit read these prompts instead of data sets."""
    monkeypatch.setattr(prompts, "fit_records", Chosen())
    monkeypatch.setattr(held, "held_records", made_up_held)
    # A random model has refusal tokens and never says them.
    monkeypatch.setattr(vectors, "find_openings", lambda loaded, _harmful, _plain: token_openings(loaded))


def small_fit(loaded: LoadedModel, folder: Path, settings: Settings, lines: list[str] | None = None) -> Fit:
    """A fit in `folder`, nothing run yet; what it says goes into `lines`."""
    say = (lambda _line: None) if lines is None else lines.append
    directory = DataDirectory(path=folder)
    return Fit(loaded=loaded, directory=directory, work=folder / "work", settings=settings, say=say)
