"""The index of drift is the textbook's, over the latest scores of each gated profile."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from pathlib import Path

import pytest

from server.catalog import LiveCatalog
from server.cli import reference_scores
from server.observe.drift import FEWEST, WINDOW, ProbeDrift, stability_index
from server.observe.labels import Labels
from server.observe.reference import BINS, fit_reference, read_references, references_of
from steering.errors import OperatorError
from tests.fakes import FakeEngine, make_bundle, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, scrape, value

DEMO = Path(__file__).resolve().parents[3] / "artifacts" / "demo" / "bundle"


@pytest.mark.parametrize(
    ("reference", "observed", "expected"),
    [
        ([10, 10], [50, 50], 0.0),
        ([50, 50], [75, 25], 0.25 * math.log(1.5) - 0.25 * math.log(0.5)),
        ([20, 30, 50], [50, 30, 20], 2 * 0.3 * math.log(2.5)),
        ([60, 40], [90, 10], 0.3 * math.log(1.5) + 0.3 * math.log(4)),
    ],
)
def test_index_is_the_sum_over_bins_worked_out_by_hand(
    reference: list[int], observed: list[int], expected: float
) -> None:
    """Shares p observed and q of reference: the sum of (p - q) ln(p / q), the same in either direction."""
    assert stability_index(reference, observed, smoothing=0) == pytest.approx(expected)
    assert stability_index(observed, reference, smoothing=0) == pytest.approx(expected)


def test_smoothing_makes_an_empty_bin_finite() -> None:
    """(0 + 1/2) / (4 + 1) against (2 + 1/2) / (4 + 1): 0.4 ln 5 on each side."""
    assert stability_index([2, 2], [0, 4]) == pytest.approx(0.4 * math.log(5) + 0.4 * math.log(4.5 / 2.5))


def referenced(*counts: int) -> dict[str, tuple[int, ...]]:
    """References of the fake's probe."""
    return {"prompt": counts}


async def test_a_profile_has_an_index_once_enough_was_read(make: Make) -> None:
    """All scores in one bin against an even reference; fewer than enough give their number alone."""
    bundle = dataclasses.replace(make_gated_bundle(), references=referenced(*([10] * BINS)))
    engine = FakeEngine(scores=[read(0.97)])
    spoken = make(engine, make_catalog(bundle))
    for _ in range(FEWEST - 1):
        await spoken.chat(max_tokens=1)
    await spoken.chat(steering={"mode": "off"})
    found = await scrape(spoken)
    assert value(found, "steering_probe_drift_samples", profile="refusal-control") == FEWEST - 1
    assert "steering_probe_drift_psi" not in found
    await spoken.chat(max_tokens=1)
    found = await scrape(spoken)
    expected = stability_index([20] * 10, [0] * 9 + [FEWEST])
    assert value(found, "steering_probe_drift_psi", profile="refusal-control") == pytest.approx(expected)
    assert "manual" not in str(found["steering_probe_drift_samples"])


async def test_only_the_latest_scores_count(make: Make) -> None:
    """A window slides: after so many more scores of another kind nothing of the first is left."""
    bundle = dataclasses.replace(make_gated_bundle(), references=referenced(*([10] * BINS)))
    spoken = make(FakeEngine(scores=[read(0.97)]), make_catalog(bundle))
    await spoken.chat()
    drift = spoken.gateway.observation._drift
    (window,) = drift._windows.values()
    assert window.maxlen == WINDOW
    window.extend([0] * WINDOW)
    found = await scrape(spoken)
    expected = stability_index([20] * 10, [WINDOW] + [0] * 9)
    assert value(found, "steering_probe_drift_psi", profile="refusal-control") == pytest.approx(expected)


async def test_a_profile_without_a_reference_tells_nothing(make: Make) -> None:
    """No reference is made up; and an operator's file makes one, also before the bundle's own."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()))
    await spoken.chat()
    assert "steering_probe_drift_samples" not in await scrape(spoken)


async def test_an_operators_reference_goes_before_the_bundles(make: Make, tmp_path: Path) -> None:
    """As the command writes it, of the server's own traffic."""
    bundle = dataclasses.replace(make_gated_bundle(), references=referenced(*([10] * BINS)))
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"refusal-control": [0] * 19 + [500]}))
    spoken = make(FakeEngine(scores=[read(0.97)]), make_catalog(bundle), drift_reference=path)
    for _ in range(FEWEST):
        await spoken.chat(max_tokens=1)
    found = await scrape(spoken)
    assert value(found, "steering_probe_drift_psi", profile="refusal-control") < 0.05


async def test_what_a_server_counted_becomes_a_reference(make: Make) -> None:
    """The buckets of `steering_probe_score`, whose edges are the reference's."""
    engine = FakeEngine()
    spoken = make(engine, make_catalog(make_gated_bundle()))
    for refusal in (0.0, 0.02, 0.04, 0.42, 0.97, 1.0):
        engine.scores = [read(refusal)]
        await spoken.chat(max_tokens=1)
    (counts,) = references_of(spoken.gateway.metrics.exposition().decode()).values()
    assert sum(counts) == 6
    assert (counts[0], counts[8], counts[19]) == (3, 1, 2)


async def test_scores_near_the_ends_have_buckets_of_their_own(make: Make) -> None:
    """Where probes are sure most scores lie, and thresholds are chosen: 1 and 99 % are edges."""
    engine = FakeEngine()
    spoken = make(engine, make_catalog(make_gated_bundle()))
    for refusal in (0.005, 0.03, 0.97, 0.995):
        engine.scores = [read(refusal)]
        await spoken.chat(max_tokens=1)
    found = await scrape(spoken)
    below = {labels["le"]: count for labels, count in found["steering_probe_score_bucket"]}
    assert [below[edge] for edge in ("0.01", "0.05", "0.95", "0.99", "1.0")] == [1, 2, 2, 3, 4]


async def test_the_command_writes_what_the_server_reads(make: Make, tmp_path: Path) -> None:
    """From a scrape to a reference that a server starts with; nothing is written of a server that has read nothing."""
    spoken = make(FakeEngine(scores=[read(0.97)]), make_catalog(make_gated_bundle()))
    scraped, out = tmp_path / "metrics", tmp_path / "reference.json"
    scraped.write_text((await spoken.admin.get("/metrics")).text)
    with pytest.raises(OperatorError, match="counts no scores yet"):
        reference_scores(out, str(scraped))
    await spoken.chat(max_tokens=1)
    scraped.write_text((await spoken.admin.get("/metrics")).text)
    reference_scores(out, str(scraped))
    assert read_references(out) == {"refusal-control": (*([0] * 19), 1)}


@pytest.mark.parametrize("text", ["{", "[]", '{"p": [1]}', '{"p": [' + ",".join(["-1"] * 20) + "]}"])
def test_a_reference_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    """With the file's name and what it has to hold."""
    path = tmp_path / "reference.json"
    path.write_text(text)
    with pytest.raises(OperatorError, match="reference-scores"):
        read_references(path)
    with pytest.raises(OperatorError, match="No such file"):
        read_references(tmp_path / "missing.json")


@pytest.mark.skipif(not DEMO.is_dir(), reason="needs a checkout: the wheel holds no demo")
def test_the_demos_report_tells_how_its_probe_scored_at_its_calibration() -> None:
    """The sum over the groups of prompts of the fit's report; another layer's report is not taken, nor a broken one."""
    report = json.loads((DEMO / "report.json").read_bytes())
    counts = fit_reference(DEMO, report["probe"]["layer"])
    assert len(counts) == BINS
    assert sum(counts) == report["activations"]["count"]["calibrate"]
    assert fit_reference(DEMO, report["probe"]["layer"] + 1) == ()
    assert fit_reference(None, 2) == fit_reference(DEMO / "missing", 2) == ()


def test_windows_of_bundles_that_are_gone_are_dropped() -> None:
    """What was unloaded leaves nothing behind."""
    gated = make_gated_bundle()
    catalog = LiveCatalog(make_catalog(make_bundle(), gated))
    drift = ProbeDrift(catalog, Labels(catalog), {})
    drift._windows[gated.digest, "refusal-control"] = deque([1])
    catalog.remove(gated.digest)
    list(drift.collect())
    assert drift._windows == {}
