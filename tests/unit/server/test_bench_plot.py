"""The picture of a run of the engine's matrix."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from server.bench import plot
from server.bench.arms import ARMS, Arm, Served, Side
from server.bench.cells import Measured, Order
from server.bench.peers import Peer
from steering.errors import OperatorError


def test_the_picture_shows_every_arm_and_stands_alone(tmp_path: Path) -> None:
    """An SVG with text as text, the arms' names on it, no peer in it, and nothing to fetch."""
    rows = []
    for cell in Order(shape=None, batches=(1, 8), prompts=(128,), tokens=4, pairs=1).cells:
        for metric in cell.metrics:
            for arm in (ARMS[0], Arm(name="beside", side=Side(engine=Served.ONE), against=Peer.HOOKS.value)):
                row = Measured(arm=arm.name, against=arm.against, metric=metric, cell=cell, bounds={"most": 1.0})
                row.mine, row.others = [1.01, 1.02, 1.0], [1.0, 1.0, 1.0]
                rows.append(row)
    ratios = [ratio for ratio in (row.ratio() for row in rows) if ratio is not None]
    path = tmp_path / "matrix.svg"
    plot.draw(path, [row.facts for row in rows], ratios, "tiny, somewhere")
    text = path.read_text(encoding="utf-8")
    ET.fromstring(text)  # noqa: S314 - written just now
    assert ARMS[0].title in text
    assert Peer.HOOKS.value not in text
    for shown in ("seconds per token", "8 requests", "prompt 128"):
        assert shown in text
    assert "<image" not in text
    again = tmp_path / "again.svg"
    plot.draw(again, [row.facts for row in rows], ratios, "tiny, somewhere")
    assert again.read_bytes() == path.read_bytes()


def test_a_plot_that_cannot_be_drawn_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after hours of measuring."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(OperatorError, match="--no-plot"):
        plot.require_matplotlib()
