"""P1's Table 1: whose verdicts fill it, and the commands that do."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from steering.evaluate.suites import SUITES, Group, suite_from_option
from steering.evaluate.table1 import COLUMNS, COMMANDS, MICRO, OVER_REFUSAL, REFUSAL, table1

RATE = {"rate": 0.25, "low": 0.2, "high": 0.3, "count": 25, "n": 100}


def test_every_row_has_a_number_for_every_column() -> None:
    """As printed: seven columns."""
    assert all(len(row.paper) == len(COLUMNS) for row in (*OVER_REFUSAL, *REFUSAL))


def test_cells_of_this_run_stand_in_the_columns_of_its_model_alone() -> None:
    """By the judge that is named, whatever others said."""
    rates = {"llm": {"refused": RATE}, "token": {"refused": {**RATE, "rate": 0.9, "count": 90}}}
    model, arm = COLUMNS[0]
    told = table1({arm: {"xstest-safe": {"judges": rates}}}, model, "llm")
    cells = {
        (row["name"], column): cell for row in told["blocks"][0]["rows"] for column, cell in enumerate(row["here"])
    }
    filled = {place: cell for place, cell in cells.items() if cell is not None}
    assert list(filled) == [("XSTest safe", 0)]
    assert filled["XSTest safe", 0]["rate"] == RATE["rate"]


def test_every_set_of_the_table_has_a_way_in_and_averages_count_prompts() -> None:
    """Each row but the averages is asked by a suite or a file, pooled on its side, and the commands name all of them;
    an average is filled once every set of its block is.
    """
    model, arm = COLUMNS[0]
    for rows, group in ((OVER_REFUSAL, Group.OVER_REFUSAL), (REFUSAL, Group.REFUSAL)):
        names = [row.suite for row in rows if row.name != MICRO]
        assert None not in names
        for name in names:
            option = f"--suite {name}" if name in SUITES else f"--prompts {name}={name}.txt"
            suite = SUITES[name] if name in SUITES else suite_from_option(f"{name}=x.txt")
            assert suite.group is group
            assert all(option in line for line in COMMANDS if line.startswith("trimtab eval run"))
        results = {
            name: {"judges": {"llm": {"refused": {**RATE, "n": 100 * (1 + place)}}}} for place, name in enumerate(names)
        }
        place = (OVER_REFUSAL, REFUSAL).index(rows)

        def average(found: dict[str, Any], block: int = place) -> Any:
            return table1({arm: found}, model, "llm")["blocks"][block]["rows"][-1]["here"][0]

        told = average(results)
        assert (told["count"], told["n"]) == (25 * len(names), 100 * sum(range(1, len(names) + 1)))
        assert average({name: found for name, found in results.items() if name != names[0]}) is None


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("trimtab ")])
def test_commands_are_ones_that_the_command_line_takes(line: str) -> None:
    """Every option is known, what has to be accepted is, and a model of 8 billion weights goes to the GPU."""
    import typer.main

    from server.cli import app

    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, words, resilient_parsing=False)
    if command.name in {"control", "run"}:
        assert context.params["device_map"] == "auto"
        assert context.params["dtype"].value == "bfloat16"
    if command.name == "transfer":
        assert context.params["accept_transfer"]


def test_every_model_of_the_paper_has_its_commands() -> None:
    """Each is downloaded, served and asked."""
    for model in dict.fromkeys(model for model, _ in COLUMNS):
        assert any(line.startswith(f"hf download {model}") for line in COMMANDS)
        assert any(line.endswith(f"--served-model-name {model}") for line in COMMANDS)
