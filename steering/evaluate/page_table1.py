"""P1's Table 1 as a section of the page: the paper's numbers beside those measured here."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from steering.evaluate.markup import cell, details, paragraph, table


def table1_section(report: Mapping[str, Any]) -> str:
    """Two columns, paper and here, for each model and arm; another model's numbers stand apart."""
    told = report["table1"]
    short = [f"{column['model'].rpartition('/')[2][:22]}: {column['arm']}" for column in told["columns"]]
    heads = ["set", *(f"{name}: {which}" for name in short for which in ("paper", "here"))]
    other = told["other_model"]
    if other:
        heads += [f"{other}: {arm}" for arm in ("unsteered", "categorical", "low-rank")]
    out = paragraph(
        f"{told['source']}; refused in percent. “here” is empty where the model or the data set is not at hand."
        + (f" The last columns are {other}, another model: not to be compared with the paper's." if other else "")
    )
    for block in told["blocks"]:
        rows = []
        for row in block["rows"]:
            cells = [f'<span title="{escape(row["note"], quote=True)}">{escape(row["name"])}</span>']
            for paper, here in zip(row["paper"], row["here"], strict=True):
                cells += [f"{paper:.2f}", "" if here is None else cell(here)]
            if other:
                cells += ["" if found is None else cell(found) for found in row["other"]]
            rows.append(cells)
        out += f"<h3>{escape(block['title'])}</h3>" + table(heads, rows)
    commands = escape("\n".join(told["commands"]))
    return (
        out
        + paragraph(told["discrepancy"])
        + paragraph(
            "Sets that are not in the registry are asked from files of their prompts, one a line; leave out the "
            "--prompts whose file is not there, and the averages stay empty."
        )
        + details("Commands that fill it on a GPU host", f"<pre>{commands}</pre>")
    )
