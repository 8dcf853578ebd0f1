"""P2's Table 1: the paper's cells, this run's, and the commands that fill them."""

from __future__ import annotations

import shlex

import pytest

from steering.evaluate.page_topics import table1_topics_section
from steering.evaluate.suites import find_suite
from steering.evaluate.table1_topics import COLUMNS, LARGE, ROWS, SUITES, THINKING, commands, topics_table1

RATE = {"rate": 0.25, "low": 0.2, "high": 0.3, "count": 25, "n": 100}
RESULTS = {
    "unsteered": {"ccp-sensitive": {"judges": {"llm": {"refused": RATE}}}},
    "topics-wrmd": {"jbb-harmful": {"judges": {"llm": {"refused": RATE}}}},
}


def test_cells_of_this_run_stand_in_the_rows_of_its_model_alone() -> None:
    """The paper's headline stays as printed beside what was measured; another model's rows stay empty."""
    told = topics_table1(RESULTS, f"models/{LARGE}", "llm")
    filled = {
        (row["model"], row["arm"], column)
        for row in told["rows"]
        for column, here in zip(told["columns"], row["here"], strict=True)
        if here is not None
    }
    assert filled == {(LARGE, "unsteered", COLUMNS[0]), (LARGE, "topics-wrmd", COLUMNS[1])}
    best = next(row for row in told["rows"] if row["configuration"] == "top 16, α -0.15")
    assert best["paper"][:2] == [23.82, 99.0]
    assert "25.0" in table1_topics_section(told)
    other = topics_table1(RESULTS, "trimtab-demo", "llm")
    assert not any(here for row in other["rows"] for here in row["here"])


def test_every_row_has_a_number_for_every_column() -> None:
    """Thirteen rows of eight, as printed, and suites that an evaluation here has."""
    assert len(ROWS) == 13
    assert all(len(row.paper) == len(COLUMNS) for row in ROWS)
    for suite in SUITES:
        assert find_suite(suite).name == suite


@pytest.mark.parametrize("model", [LARGE, THINKING])
def test_commands_are_ones_that_the_command_line_takes(model: str) -> None:
    """Each `trimtab fit topics` line parses, with every option known; presets are those that the model has."""
    import typer.main

    from steering.fit.cli import app

    command = typer.main.get_command(app).commands["topics"]  # type: ignore[attr-defined]
    fits = [line for line in commands(model) if line.startswith("trimtab fit topics ")]
    assert len(fits) == (2 if model == LARGE else 1)
    for line in fits:
        context = command.make_context("topics", shlex.split(line)[3:], resilient_parsing=False)
        assert str(context.params["preset"]).startswith("paper-")
