"""Plot: the matrix as one picture, a panel per metric, a row per arm and a mark with its interval per cell."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.bench.arms import Metric
from server.bench.report import Ratio
from steering.errors import OperatorError

MARKERS = "osD^vP*X"
AXES = {
    Metric.THROUGHPUT: "tokens per second ÷ reference's",
    Metric.PACE: "seconds per token ÷ reference's",
    Metric.FIRST: "seconds to first token ÷ reference's",
}


def require_matplotlib() -> None:
    """Say before a long run that its picture could not be drawn.

    Raises:
        OperatorError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OperatorError("the plot needs matplotlib: install the extra `fit`, or leave it out with --no-plot")


def draw(path: Path, cells: Sequence[Mapping[str, Any]], ratios: Sequence[Ratio], title: str) -> None:
    """Write the picture as SVG.

    Args:
        path: of the file.
        cells: as `cells.Measured.facts` gives them.
        ratios: by the same names; peers, which differ by far more than an axis has room for, are left out.
        title: what was measured, on what.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    by_name = {ratio.name: ratio for ratio in ratios}
    shown = [cell for cell in cells if cell["name"] in by_name and _is_arm(cell)]
    metrics = [metric for metric in Metric if any(cell["metric"] == metric.value for cell in shown)]
    rows = list(dict.fromkeys(f"{cell['arm']} ÷ {cell['against']}" for cell in shown))
    batches = sorted({cell["batch"] for cell in shown})
    prompts = sorted({cell["prompt"] for cell in shown})
    spread = [(batch, prompt) for prompt in prompts for batch in batches]
    # Text stays text, and the same numbers give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trimtab"}):
        figure = Figure(figsize=(4.6 * max(1, len(metrics)) + 2.4, 0.6 * len(rows) + 2.2), layout="constrained")
        panels = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
        for metric, axes in zip(metrics, panels, strict=False):
            axes.axvline(1.0, color="0.4", linewidth=1)
            for cell in shown:
                if cell["metric"] != metric.value:
                    continue
                place = spread.index((cell["batch"], cell["prompt"]))
                down = rows.index(f"{cell['arm']} ÷ {cell['against']}")
                height = down + (place - (len(spread) - 1) / 2) * 0.8 / len(spread)
                _mark(axes, by_name[cell["name"]], height, batches.index(cell["batch"]), prompts.index(cell["prompt"]))
            axes.set_xlabel(AXES[metric])
            axes.grid(axis="x", color="0.9")
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        _explain(figure, batches, prompts)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _is_arm(cell: Mapping[str, Any]) -> bool:
    from server.bench.peers import Peer

    return cell["against"] not in {peer.value for peer in Peer}


def _mark(axes: Any, ratio: Ratio, height: float, colour: int, marker: int) -> None:
    """Median with its interval; a short bar where the target lies, red where it is missed."""
    shade = f"C{colour % 10}"
    axes.plot([ratio.low, ratio.high], [height, height], color=shade, linewidth=1.2)
    axes.plot([ratio.median], [height], color=shade, marker=MARKERS[marker % len(MARKERS)], markersize=4)
    bound = ratio.target if ratio.target is not None else ratio.most
    if bound is not None:
        ends = [height - 0.06, height + 0.06]
        axes.plot([bound, bound], ends, color="0.2" if ratio.verdict == "met" else "red", linewidth=1.5)


def _explain(figure: Any, batches: Sequence[int], prompts: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=f"C{number % 10}", label=f"{batch} requests") for number, batch in enumerate(batches)
    ]
    handles += [
        Line2D([], [], color="0.4", linestyle="", marker=MARKERS[number % len(MARKERS)], label=f"prompt {prompt}")
        for number, prompt in enumerate(prompts)
    ]
    handles.append(Line2D([], [], color="0.2", linestyle="", marker="|", label="asked (red: missed)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
