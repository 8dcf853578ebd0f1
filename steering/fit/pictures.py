"""Pictures of a control fit, one for each stage, drawn from what the stage left. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steering.fit.control import Fit, Variant
from steering.fit.vectors import categorical, cosines


def new_figure(width: float = 5.0, height: float = 3.2) -> Any:
    """An empty figure of that many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write it as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version of the drawing library in the file: the same numbers give the same bytes.
    figure.savefig(path, metadata={"Software": None})


def norms(facts: Mapping[str, Any], path: Path) -> None:
    """Mean length of the residual by layer."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(facts["residual_norm"], marker="o")
    axes.set(xlabel="layer (0-based, block output)", ylabel="mean residual norm", title="residuals of fit prompts")
    save_figure(figure, path)


def vectors(means: Mapping[str, Tensor], fit: Fit, path: Path) -> None:
    """Cosines between the categories' directions at the middle layer."""
    layer = len(fit.loaded.blocks) // 2
    found = cosines({name: categorical(means, Variant.HEADER, name, layer, fit.settings)[0] for name in fit.categories})
    matrix(found, path, f"cosines of category directions, layer {layer}")


def matrix(found: Mapping[str, Any], path: Path, title: str) -> None:
    """A matrix of cosines."""
    figure = new_figure(6.5, 5.5)
    axes = figure.add_subplot()
    image = axes.imshow(found["cosines"], vmin=-1, vmax=1, cmap="RdBu_r")
    places = range(len(found["names"]))
    axes.set_xticks(places, found["names"], rotation=90, fontsize=7)
    axes.set_yticks(places, found["names"], fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes)
    save_figure(figure, path)


def layers(swept: Mapping[str, Any], path: Path) -> None:
    """The best effect of either sign by layer, with the chosen layer marked."""
    figure = new_figure()
    axes = figure.add_subplot()
    places = [row["layer"] for row in swept["layers"]]
    for sign, label in (("comply", "borderline refusals removed"), ("refuse", "plain prompts refused")):
        effects = [row["chosen"][sign]["effect"] for row in swept["layers"]]
        axes.plot(places, effects, marker="o", label=f"{sign}: {label}")
    axes.axvline(swept["layer"], color="grey", linestyle=":", label="chosen layer")
    axes.set(xlabel="layer (0-based, block output)", ylabel="share of calibration prompts", ylim=(-0.05, 1.05))
    axes.legend(fontsize=7)
    save_figure(figure, path)


def probe(found: Mapping[str, Any], path: Path) -> None:
    """Layer sweep, ROC with operating points, and calibration."""
    figure = new_figure(10, 3.4)
    sweep, roc, reliability = figure.subplots(1, 3)
    places = [row["layer"] for row in found["layers"]]
    sweep.plot(places, [row["contested"] for row in found["layers"]], marker="o", label="without plain prompts")
    sweep.plot(places, [row["all"] for row in found["layers"]], marker=".", label="all")
    sweep.axvline(found["layer"], color="grey", linestyle=":")
    sweep.set(xlabel="layer", ylabel="area under the ROC curve")
    sweep.legend(fontsize=7)
    roc.plot([point[2] for point in found["roc"]], [point[1] for point in found["roc"]])
    for point in found["operating_points"]:
        roc.plot(point["false_positive_rate"], point["true_positive_rate"], "o", label=point["name"])
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title=f"area {found['area']:.3f}")
    roc.legend(fontsize=7)
    bins = found["calibration"]["bins"]
    reliability.plot([0, 1], [0, 1], color="grey", linestyle=":")
    reliability.plot([row["probability"] for row in bins], [row["share"] for row in bins], marker="o")
    error = found["calibration"]["expected_calibration_error"]
    reliability.set(xlabel="probability", ylabel="share to refuse", title=f"calibration error {error:.3f}")
    save_figure(figure, path)


def confusion(found: Mapping[str, Any], path: Path) -> None:
    """Which category the head found, by the one a prompt belongs to."""
    figure = new_figure(6.5, 5.5)
    axes = figure.add_subplot()
    table = [[count / max(1, sum(row)) for count in row] for row in found["confusion"]]
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues")
    places = range(len(found["categories"]))
    for row, counts in enumerate(found["confusion"]):
        for column, count in enumerate(counts):
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7)
    axes.set_xticks(places, found["categories"], rotation=90, fontsize=7)
    axes.set_yticks(places, found["categories"], fontsize=7)
    axes.set(xlabel="found", ylabel="belongs to", title=f"accuracy {found['accuracy']:.3f}, n = {found['n']}")
    save_figure(figure, path)


def training(found: Mapping[str, Any], path: Path) -> None:
    """The two losses of the low-rank vector by epoch."""
    figure = new_figure()
    axes = figure.add_subplot()
    for key, label in (("refusal", "-log p(refusal | harmful)"), ("divergence", "KL(base, steered), benign")):
        axes.plot([row[key] for row in found["history"]], marker="o", label=label)
    axes.set(xlabel="epoch", ylabel="nats", title="low-rank vector", xticks=range(len(found["history"])))
    axes.legend(fontsize=7)
    save_figure(figure, path)


def openings(found: Mapping[str, Any], path: Path) -> None:
    """How refusals begin, and how many answers to harmful and to plain prompts begin so."""
    rows = found["refusals"]
    figure = new_figure(7, 0.4 * len(rows) + 1.2)
    axes = figure.add_subplot()
    for offset, kind in ((0.0, "harmful"), (0.4, "plain")):
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, [row[kind] for row in rows], 0.4, label=f"{kind} prompts")
    axes.set_yticks([place + 0.2 for place in range(len(rows))], [repr(row["text"]) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="share of greedy answers that begin so")
    axes.legend(fontsize=7)
    save_figure(figure, path)


def additions(found: Mapping[str, Any], path: Path) -> None:
    """How much the null-space map adds to prompts of each kind."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.bar(list(found["mean_addition"]), list(found["mean_addition"].values()))
    axes.set(ylabel="mean length added", title=f"null-space map of rank {found['rank']}")
    save_figure(figure, path)


def doses(found: Mapping[str, Any], path: Path) -> None:
    """For each edit, refusals by multiple of its length."""
    figure = new_figure(9, 4)
    sides = dict(zip(("comply", "refuse"), figure.subplots(1, 2), strict=True))
    for key, dose in found["edits"].items():
        curve = dose["curve"]
        sides[dose["purpose"]].plot(
            [row["multiple"] for row in curve], [row["refused"]["rate"] for row in curve], marker=".", label=key
        )
    for purpose, axes in sides.items():
        axes.set(xlabel="multiple", ylabel="share refused", title=purpose, ylim=(-0.05, 1.05))
        axes.legend(fontsize=5)
    save_figure(figure, path)


def gates(found: Mapping[str, Any], path: Path) -> None:
    """The plane of refusal and over-refusal: each family's best thresholds, and the ones chosen."""
    figure = new_figure(6, 4.5)
    axes = figure.add_subplot()
    for name, family in found["families"].items():
        points = [choice["rates"] for choice in family["frontier"]]
        line = axes.plot([rate["over"] for rate in points], [rate["refuse"] for rate in points], label=name)[0]
        chosen = family["chosen"]["rates"]
        axes.plot(chosen["over"], chosen["refuse"], "o", color=line.get_color())
    start = next(iter(found["families"].values()))["unsteered"]
    axes.plot(start["over"], start["refuse"], "k*", markersize=10, label="unsteered")
    axes.set(xlabel="prompts to answer, not answered", ylabel="prompts to refuse, refused")
    axes.legend(fontsize=7)
    save_figure(figure, path)


def comparison(found: Mapping[str, Any], path: Path) -> None:
    """Over-refusal of both sides of every comparison."""
    labels, values, colours = [], [], []
    for entry in (*found["rounds"], *found["beside"]):
        for name, rates in entry["rates"].items():
            labels.append(f"{entry['what']}: {name}")
            values.append(rates["rates"]["over"])
            colours.append("tab:blue" if name == entry.get("kept", entry.get("in_place")) else "lightgrey")
    figure = new_figure(8, 0.35 * len(labels) + 1)
    axes = figure.add_subplot()
    axes.barh(range(len(labels)), values, color=colours)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="prompts to answer, not answered (calibration); what is in place is blue")
    save_figure(figure, path)


def held(found: Mapping[str, Any], path: Path) -> None:
    """Refusals of the pooled held sets under every profile."""
    pools: Mapping[str, Mapping[str, Any]] = found["pools"]
    arms: Sequence[str] = [arm for arm in next(iter(pools.values()), {}) if ", " not in arm]
    figure = new_figure(9, 4)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(arms))
    for number, arm in enumerate(arms):
        rates = [pool[arm] for pool in pools.values()]
        places = [place + number * width for place in range(len(rates))]
        errors = [[rate["rate"] - rate["low"] for rate in rates], [rate["high"] - rate["rate"] for rate in rates]]
        axes.bar(places, [rate["rate"] for rate in rates], width, yerr=errors, label=arm, error_kw={"linewidth": 0.7})
    axes.set_xticks([place + 0.4 for place in range(len(pools))], list(pools), fontsize=8)
    axes.set(ylabel="share refused")
    axes.legend(fontsize=6)
    save_figure(figure, path)


def response(found: Mapping[str, Any], path: Path) -> None:
    """Held answers that the response probe is right on, by number of tokens, and its calibration."""
    figure = new_figure(8, 3.4)
    right, reliability = figure.subplots(1, 2)
    if "skipped" in found:
        right.set(title="no response probe: too few refusals or answers")
        save_figure(figure, path)
        return
    for layer in dict.fromkeys(row["layer"] for row in found["layers"]):
        rows = [row for row in found["layers"] if row["layer"] == layer]
        right.plot([row["tokens"] for row in rows], [row["held"]["rate"] for row in rows], marker=".", label=f"{layer}")
    right.plot(found["tokens"], found["accuracy"]["rate"], "k*", markersize=10)
    right.set(xlabel="generated tokens read", ylabel="right on held answers", title="by layer; the star is chosen")
    right.legend(fontsize=6, ncols=3)
    bins = found["calibration"]["balanced"]["bins"]
    error = found["calibration"]["balanced"]["expected_calibration_error"]
    reliability.plot([0, 1], [0, 1], color="grey", linestyle=":")
    reliability.plot([row["probability"] for row in bins], [row["share"] for row in bins], marker="o")
    reliability.set(xlabel="probability", ylabel="share of refusals", title=f"calibration error {error:.3f}")
    save_figure(figure, path)
