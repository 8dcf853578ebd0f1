"""Table 1 of arXiv 2512.16602: the paper's rates, and where this run's go.

A cell of this run is empty where the model or the data set is not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUITES = ("ccp-sensitive", "jbb-harmful")
"""Suites here of the table's first two columns."""

COLUMNS = (
    "CCP-sensitive refused",
    "JailbreakBench refused",
    "GSM8K",
    "HumanEval",
    "IFEval",
    "MMLU-Pro engineering",
    "MMLU-Pro health",
    "MMLU-Pro philosophy",
)
INSTRUCT, THINKING, LARGE = "Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507", "Qwen3-Next-80B-A3B-Thinking"
"""Names they are published by; the paper calls the small pair Qwen3-Next-4B."""

UNSTEERED = "unsteered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        arm: of an evaluation here; `topics-<method>` is the profile of that method.
        trained: mixture of prompts, as in the paper.
        configuration: top-k and α.
        paper: by `COLUMNS`, in percent.
    """

    model: str
    arm: str
    trained: str
    configuration: str
    paper: tuple[float, ...]


ROWS = (
    Row(
        model=INSTRUCT,
        arm=UNSTEERED,
        trained="",
        configuration="",
        paper=(89.12, 99.0, 93.40, 73.78, 83.92, 61.61, 67.24, 58.72),
    ),
    Row(
        model=INSTRUCT,
        arm="topics-wrmd",
        trained="extended",
        configuration="top 4, α -0.5",
        paper=(32.65, 55.0, 93.63, 73.17, 83.36, 61.20, 66.14, 59.32),
    ),
    Row(
        model=THINKING,
        arm=UNSTEERED,
        trained="",
        configuration="",
        paper=(81.47, 98.0, 95.00, 87.20, 85.77, 66.77, 67.11, 55.31),
    ),
    Row(
        model=THINKING,
        arm="topics-wrmd",
        trained="extended",
        configuration="top 2, α -2",
        paper=(34.71, 78.0, 95.07, 86.59, 87.99, 66.15, 67.48, 57.11),
    ),
    Row(
        model=LARGE,
        arm=UNSTEERED,
        trained="",
        configuration="",
        paper=(92.35, 99.0, 96.66, 95.73, 88.54, 76.88, 75.06, 72.95),
    ),
    Row(
        model=LARGE,
        arm="topics-md",
        trained="china",
        configuration="top 4, α -0.5",
        paper=(33.24, 81.0, 95.53, 94.51, 88.35, 72.55, 74.82, 69.34),
    ),
    Row(
        model=LARGE,
        arm="topics-rmd",
        trained="china",
        configuration="top 4, α -0.75",
        paper=(27.06, 82.0, 95.60, 93.29, 85.21, 71.52, 74.94, 69.74),
    ),
    Row(
        model=LARGE,
        arm="topics-wmd",
        trained="china",
        configuration="top 8, α -0.25",
        paper=(55.00, 91.0, 96.44, 95.12, 88.54, 74.92, 75.92, 73.35),
    ),
    Row(
        model=LARGE,
        arm="topics-wrmd",
        trained="china",
        configuration="top 8, α -0.25",
        paper=(47.35, 90.0, 95.91, 93.29, 86.14, 73.37, 76.16, 71.34),
    ),
    Row(
        model=LARGE,
        arm="topics-md",
        trained="extended",
        configuration="top 4, α -1",
        paper=(58.82, 92.0, 94.92, 95.73, 88.72, 74.72, 76.77, 72.14),
    ),
    Row(
        model=LARGE,
        arm="topics-rmd",
        trained="extended",
        configuration="top 4, α -2",
        paper=(67.07, 86.87, 90.90, 95.12, 87.25, 70.79, 76.28, 72.14),
    ),
    Row(
        model=LARGE,
        arm="topics-wmd",
        trained="extended",
        configuration="top 8, α -0.25",
        paper=(33.73, 84.0, 94.31, 95.12, 89.28, 71.41, 75.67, 72.55),
    ),
    Row(
        model=LARGE,
        arm="topics-wrmd",
        trained="extended",
        configuration="top 16, α -0.15",
        paper=(23.82, 99.0, 96.13, 93.90, 88.54, 67.70, 75.31, 69.54),
    ),
)

_PROMPTS = (
    "--refused ccp_sensitive/train --refused deccp/censored --answered deccp/uncensored --answered gpteacher/roleplay "
    "--answered gpteacher/codegen --answered gsm8k/train --safety advbench/all --safety catqa/all"
)


def commands(model: str) -> list[str]:
    """What fills the table's cells of one model, on a host with a GPU and a judge's endpoint."""
    folder = model.casefold()
    presets = ["paper-extended", *(["paper-china"] if model == LARGE else [])]
    told = [f"hf download Qwen/{model} --local-dir {folder}"]
    for preset in presets:
        made = f"{folder}-{preset}"
        asked = " ".join(
            f"""--arm '{arm}={{"profile": "{arm}", "mode": "comply"}}'"""
            for arm in dict.fromkeys(
                row.arm for row in ROWS if row.model == model and row.trained == preset.removeprefix("paper-")
            )
        )
        judge = "--judge-url URL --judge-model openai/gpt-oss-20b"
        told.append(
            f"trimtab fit topics --preset {preset} --model {folder} --bundle {made} --name {made} {_PROMPTS} "
            f"--judge llm {judge}"
        )
        told.append(f"trimtab serve --model {folder} --bundle {made} --served-model-name {model}")
        suites = " ".join(f"--suite {suite}" for suite in SUITES)
        told.append(
            f"trimtab eval run {suites} --all-prompts --max-tokens 8192 --bundle {made} {judge} {asked} "
            f"--out {made}-table"
        )
        told.append(
            f"trimtab eval ability --model {model} --tasks gsm8k,humaneval,ifeval --run-code {asked} "
            f"--out {made}-ability.json"
        )
    return told


def topics_table1(results: Mapping[str, Mapping[str, Any]], model: str, judge: str) -> dict[str, Any]:
    """The table with this run's cells.

    Args:
        results: tallies by arm and suite, as an evaluation has them; empty for a fit, which asks no held set.
        model: name of the model; its rows are filled only where it is one of the paper's.
        judge: whose rates are taken.
    """
    known = {row.model for row in ROWS}
    name = next((one for one in known if one.casefold() in model.casefold()), None)

    def here(row: Row) -> list[dict[str, Any] | None]:
        if row.model != name:
            return [None] * len(COLUMNS)
        tallies = [results.get(row.arm, {}).get(suite, {}).get("judges", {}).get(judge) for suite in SUITES]
        found = [None if tally is None else dict(tally["refused"]) for tally in tallies]
        return [*found, *([None] * (len(COLUMNS) - len(found)))]

    return {
        "source": "arXiv 2512.16602, Table 1",
        "note": "The paper's judge is openai/gpt-oss-20b, which sees prompt and answer. MMLU-Pro is not among the "
        "tasks of `trimtab eval ability`. Its prompts beyond CCP-sensitive and DECCP are not public as one set; the "
        "commands take what the registry has.",
        "columns": list(COLUMNS),
        "rows": [
            {
                "model": row.model,
                "arm": row.arm,
                "trained": row.trained,
                "configuration": row.configuration,
                "paper": list(row.paper),
                "here": here(row),
            }
            for row in ROWS
        ],
        "commands": [line for one in (LARGE, INSTRUCT, THINKING) for line in commands(one)],
    }
