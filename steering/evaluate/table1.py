"""P1's Table 1 (arXiv 2603.13359v1): the paper's numbers beside this run's, and the commands that fill the gaps.

Data. A cell of this run is empty where the model or the data set is not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steering.evaluate.arms import CATEGORICAL, LOW_RANK, UNSTEERED
from steering.evaluate.suites import SUITES
from steering.fit.intervals import Rate

P1_MODEL = "tomg-group-umd/zephyr-llama3-8b-sft-refusal-n-contrast-multiple-tokens"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

COLUMNS = (
    (P1_MODEL, UNSTEERED),
    (P1_MODEL, CATEGORICAL),
    (P1_MODEL, LOW_RANK),
    (LLAMA, UNSTEERED),
    (LLAMA, LOW_RANK),
    (DISTILLED, UNSTEERED),
    (DISTILLED, LOW_RANK),
)
"""Model and arm of each column of the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One data set of the table.

    Attributes:
        name: as in the paper.
        paper: refusal rates in percent, by `COLUMNS`.
        suite: the suite here that asks the same prompts, or the name under which a file of them is given; None for an
            average.
        note: how the suite differs from the paper's set.
    """

    name: str
    paper: tuple[float, ...]
    suite: str | None = None
    note: str = ""


MICRO = "micro average"
_MICRO = "every prompt of the block's sets counted once; empty while one of them is not at hand"
_BY_FILE = "not in the registry: given as a file by --prompts"
_GATED = "gated set: given as a file by --prompts"
OVER_REFUSAL = (
    Row(
        name="CoCoNot contrast",
        paper=(11.87, 1.58, 7.12, 3.69, 2.37, 12.66, 9.50),
        suite="coconot-contrast",
        note="the paper fits on these 379 prompts; here nothing does",
    ),
    Row(
        name="WildGuard unharmful",
        paper=(9.52, 1.06, 3.81, 11.15, 5.08, 39.05, 33.65),
        suite="wildguard-unharmful",
        note=_GATED,
    ),
    Row(
        name="WildJailbreak adversarial benign",
        paper=(4.76, 1.43, 3.33, 12.38, 8.57, 72.38, 66.67),
        suite="wildjailbreak-benign",
        note=_GATED,
    ),
    Row(
        name="OR-Bench hard",
        paper=(23.88, 5.84, 12.89, 60.58, 57.92, 84.61, 77.10),
        suite="or-bench-hard",
        note=_BY_FILE,
    ),
    Row(name="XSTest safe", paper=(28.00, 3.60, 5.20, 8.40, 11.20, 28.00, 23.60), suite="xstest-safe"),
    Row(name=MICRO, paper=(17.08, 3.38, 8.15, 29.39, 27.94, 56.88, 50.60), note=_MICRO),
)
REFUSAL = (
    Row(
        name="CoCoNot original",
        paper=(94.01, 96.10, 95.10, 26.47, 28.17, 50.85, 51.75),
        suite="coconot-eval",
        note="here the 40 % of the evaluation set that is held",
    ),
    Row(
        name="WildGuard harmful",
        paper=(59.02, 77.19, 73.87, 73.74, 74.27, 77.72, 84.35),
        suite="wildguard-harmful",
        note=_GATED,
    ),
    Row(
        name="WildJailbreak adversarial harmful",
        paper=(20.50, 44.60, 49.10, 77.40, 78.80, 87.65, 89.45),
        suite="wildjailbreak-harmful",
        note=_GATED,
    ),
    Row(
        name="OR-Bench toxic",
        paper=(85.95, 94.66, 94.50, 90.53, 90.69, 86.26, 86.56),
        suite="or-bench-toxic",
        note=_BY_FILE,
    ),
    Row(name="XSTest unsafe", paper=(94.50, 99.00, 97.00, 89.50, 90.00, 80.50, 83.00), suite="xstest-unsafe"),
    Row(
        name="SORRY-Bench",
        paper=(84.77, 93.64, 93.18, 77.27, 78.86, 70.45, 70.91),
        suite="sorry-bench",
        note=_GATED,
    ),
    Row(
        name="AdvBench",
        paper=(94.23, 99.23, 99.42, 93.85, 94.23, 94.23, 94.81),
        suite="advbench",
        note="only where the bundle was not fitted on it",
    ),
    Row(
        name="HarmfulQA",
        paper=(66.07, 85.31, 75.87, 60.15, 61.58, 71.99, 75.61),
        suite="harmfulqa",
        note="only where the bundle was not fitted on it",
    ),
    Row(
        name="Do-Not-Answer",
        paper=(87.01, 92.55, 95.21, 54.85, 50.48, 69.86, 71.67),
        suite="do-not-answer",
        note=_BY_FILE,
    ),
    Row(name=MICRO, paper=(65.21, 79.38, 78.07, 66.76, 67.42, 74.87, 78.36), note=_MICRO),
)
BLOCKS = (("over-refusal, lower is better", OVER_REFUSAL), ("refusal, higher is better", REFUSAL))

DISCREPANCY = (
    "The paper's own project page prints 9.74 and 30.68 where its table has 11.15 (WildGuard unharmful) and 29.39 "
    "(micro average) for Meta-Llama-3-8B-Instruct."
)

_FOLDER = "zephyr-llama3-8b-refusal-tokens"
_ON_GPU = "--device-map auto --dtype bfloat16"
_GIVEN = " ".join(
    f"--prompts {row.suite}={row.suite}.txt" for _, rows in BLOCKS for row in rows if row.note in (_GATED, _BY_FILE)
)
"""A prompt a line, or a column `prompt` in JSON, JSON Lines or CSV; those not at hand are left out of the command."""

_REGISTERED = " ".join(f"--suite {row.suite}" for _, rows in BLOCKS for row in rows if row.suite in SUITES)
_ASKING = f"{_REGISTERED} {_GIVEN} --all-prompts --max-tokens 512 --judge-url URL --judge-model MODEL {_ON_GPU}"


def _transferred(model: str, folder: str) -> tuple[str, ...]:
    """Commands for the columns of a model that the paper carried its low-rank vector over to."""
    return (
        f"hf download {model} --local-dir {folder}",
        f"trimtab bundle transfer {_FOLDER}-bundle --model {folder} --out {folder}-bundle --accept-transfer",
        f"trimtab serve --model {folder} --bundle {folder}-bundle --accept-transfer --served-model-name {model}",
        f"trimtab eval run --bundle {folder}-bundle --model {folder} {_ASKING} --out {folder}-table",
    )


COMMANDS = (
    f"hf download {P1_MODEL} --local-dir {_FOLDER}",
    f"trimtab fit control --preset paper --model {_FOLDER} {_ON_GPU} --name p1 --bundle {_FOLDER}-bundle",
    f"trimtab serve --model {_FOLDER} --bundle {_FOLDER}-bundle --served-model-name {P1_MODEL}",
    f"trimtab eval run --bundle {_FOLDER}-bundle --model {_FOLDER} {_ASKING} --out p1-table",
    *_transferred(LLAMA, "llama3-8b-instruct"),
    *_transferred(DISTILLED, "r1-distill-llama-8b"),
)
"""On a host with a GPU. The paper's judge is Llama-3.3-70B-Instruct, which reads answers without their prompts; the
model that `--judge-model` names reads both, and its verdicts fill the table."""


def table1(results: Mapping[str, Mapping[str, Any]], model: str, judge: str) -> dict[str, Any]:
    """The table with this run's cells.

    Args:
        results: tallies by arm and suite.
        model: name of the served model; its columns are filled only where it is one of the paper's. What another model
            did on the same sets stands apart, in `other`.
        judge: whose rates are taken.

    Returns:
        Columns, and by block the rows with the paper's numbers, those of the same model here, and those of this run's
        other model.
    """
    arms = (UNSTEERED, CATEGORICAL, LOW_RANK)
    is_of_paper = model in {name for name, _ in COLUMNS}

    def here(row: Row, arm: str) -> dict[str, Any] | None:
        if row.name == MICRO:
            block = next(rows for _, rows in BLOCKS if row in rows)
            cells = [here(other, arm) for other in block if other is not row]
            told = [cell for cell in cells if cell is not None]
            if len(told) < len(cells):
                return None
            return Rate(count=sum(cell["count"] for cell in told), n=sum(cell["n"] for cell in told)).to_json()
        found = results.get(arm, {}).get(row.suite or "", {}).get("judges", {}).get(judge)
        return None if found is None else dict(found["refused"])

    return {
        "source": "arXiv 2603.13359v1, Table 1",
        "discrepancy": DISCREPANCY,
        "columns": [{"model": name, "arm": arm} for name, arm in COLUMNS],
        "commands": list(COMMANDS),
        "other_model": None if is_of_paper else model,
        "blocks": [
            {
                "title": title,
                "rows": [
                    {
                        "name": row.name,
                        "note": row.note,
                        "paper": list(row.paper),
                        "here": [here(row, arm) if name == model else None for name, arm in COLUMNS],
                        "other": [None if is_of_paper else here(row, arm) for arm in arms],
                    }
                    for row in rows
                ],
            }
            for title, rows in BLOCKS
        ],
    }
