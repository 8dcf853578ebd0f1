"""Pictures of a topic fit, one for each stage, drawn from what the stage left. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.fit.pictures import new_figure, save_figure

Facts = Mapping[str, Any]
_NAMES = {"refused": "topic", "safety": "harmful", "answered": "answered"}


def confidences(by_role: Mapping[str, Sequence[float]], band: float, path: Path) -> None:
    """How confidences lie, by what prompts were given as."""
    figure = new_figure(6, 3.2)
    axes = figure.add_subplot()
    for role, values in by_role.items():
        axes.hist(values, bins=40, range=(-1, 1), histtype="step", linewidth=1.5, label=f"{role} (n = {len(values)})")
    axes.axvspan(-band, band, color="grey", alpha=0.2, label="neutral")
    axes.set(xlabel="refusal confidence c", ylabel="prompts")
    axes.legend(fontsize=7)
    save_figure(figure, path)


def layers(found: Facts, path: Path) -> None:
    """Correlation with the confidence, and the score, of each method by layer."""
    figure = new_figure(9, 3.4)
    correlation, score = figure.subplots(1, 2)
    for method, rows in found["layers"].items():
        places = [row["layer"] for row in rows]
        correlation.plot(places, [_number(row["correlation"]) for row in rows], marker=".", label=method)
        score.plot(places, [_number(row["score"]) for row in rows], marker=".", label=method)
    correlation.set(xlabel="layer (0-based, block output)", ylabel="Pearson's r with c")
    score.set(xlabel="layer (0-based, block output)", ylabel="r - RMSE of wrong signs")
    correlation.legend(fontsize=7)
    save_figure(figure, path)


def norms(found: Facts, path: Path) -> None:
    """Mean length of the residual by layer, and where ridge directions lie in the null space."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(found["residual_norm"], marker="o", label="mean residual norm")
    axes.set(xlabel="layer (0-based, block output)", ylabel="norm")
    for method in ("rmd", "wrmd"):
        shares = [_number(row.get(method, {}).get("null_share")) for row in found["ridges"]]
        if not all(map(math.isnan, shares)):
            other = axes.twinx()
            other.plot(shares, color="tab:red", linestyle="--", label=f"{method}: share in the null space")
            other.set_ylim(0, 1.05)
            other.legend(fontsize=6, loc="lower right")
            break
    axes.legend(fontsize=7)
    save_figure(figure, path)


def gate(found: Facts, path: Path) -> None:
    """How well each layer tells the gate's two sides apart."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot([row["layer"] for row in found["layers"]], [row["area"] for row in found["layers"]], marker="o")
    axes.axvline(found["layer"], color="grey", linestyle=":", label=f"chosen: area {found['area']:.3f}")
    axes.set(xlabel="layer (0-based, block output)", ylabel="area under the ROC curve")
    axes.legend(fontsize=7)
    save_figure(figure, path)


def finder(found: Facts, path: Path) -> None:
    """Shift against removal of every configuration; measured ones are filled, chosen ones ringed."""
    variants = list(dict.fromkeys(one["variant"] for one in found["candidates"]))
    figure = new_figure(5 * len(variants), 3.8)
    chosen = {row["candidate"] for row in found["chosen"]}
    for place, variant in zip(figure.subplots(1, len(variants), squeeze=False)[0], variants, strict=True):
        methods = list(dict.fromkeys(one["method"] for one in found["candidates"]))
        for number, method in enumerate(methods):
            colour = f"C{number}"
            for index, one in enumerate(found["candidates"]):
                if (one["variant"], one["method"]) != (variant, method) or one["shift"] is None:
                    continue
                is_known = one["removal"] is not None
                height = one["removal"] if is_known else one["screened_removal"]
                marker = "s" if one["is_reposition"] else "o"
                face = colour if is_known else "none"
                place.plot(one["shift"], height, marker, color=colour, markerfacecolor=face, markersize=4, alpha=0.8)
                if index in chosen:
                    place.plot(one["shift"], height, "o", color="black", markerfacecolor="none", markersize=11)
            place.plot([], [], "o", color=colour, label=method)
        place.axhline(found["target"], color="grey", linestyle=":", label="target")
        place.set(xlabel="shift L, nats a token", ylabel="removal Δc", title=variant, xscale="symlog")
        place.legend(fontsize=7)
    save_figure(figure, path)


def comparison(found: Facts, path: Path) -> None:
    """Refusals by role under every arm, calibration prompts."""
    rates = {"unsteered": found["unsteered"]["calibrate"]}
    rates |= {arm["name"]: arm["rates"]["calibrate"] for arm in found["arms"]}
    figure = new_figure(8, 3.8)
    axes = figure.add_subplot()
    width = 0.8 / len(_NAMES)
    for number, (role, name) in enumerate(_NAMES.items()):
        told = [by_role[role] for by_role in rates.values()]
        places = [place + number * width for place in range(len(told))]
        errors = [[rate["rate"] - rate["low"] for rate in told], [rate["high"] - rate["rate"] for rate in told]]
        axes.bar(places, [rate["rate"] for rate in told], width, yerr=errors, label=name, error_kw={"linewidth": 0.7})
    axes.set_xticks([place + 0.3 for place in range(len(rates))], list(rates), fontsize=7, rotation=20)
    axes.set(ylabel="share refused", ylim=(0, 1.05))
    axes.legend(fontsize=7)
    save_figure(figure, path)


def induction(found: Facts, path: Path) -> None:
    """Topic and general refusals by α, for the chosen number of layers (P2, Fig. 4)."""
    figure = new_figure(5 * max(1, len(found["chosen"])), 3.4)
    chosen = found["chosen"] or {}
    for place, (variant, best) in zip(
        figure.subplots(1, max(1, len(chosen)), squeeze=False)[0], chosen.items(), strict=False
    ):
        count = found["curve"][best["candidate"]]["count"]
        rows = [row for row in found["curve"] if row["variant"] == variant and row["count"] == count]
        for name in ("topic", "general"):
            line = place.plot(
                [0.0, *(row["alpha"] for row in rows)],
                [
                    found["unsteered"]["calibrate"][name]["rate"],
                    *(row["rates"]["calibrate"][name]["rate"] for row in rows),
                ],
                marker="o",
                label=name,
            )[0]
            place.axvline(found["curve"][best["candidate"]]["alpha"], color="grey", linestyle=":")
            line.set_zorder(3)
        place.set(xlabel="α", ylabel="share refused", ylim=(-0.05, 1.05), title=f"{variant}, {count} layers")
        place.legend(fontsize=7)
    save_figure(figure, path)


def ranges(found: Facts, path: Path) -> None:
    """Share of broken answers by strength."""
    figure = new_figure()
    axes = figure.add_subplot()
    for name, facts in found["edits"].items():
        strengths = [float(strength) for strength in facts["broken"]]
        axes.plot(strengths, [count / facts["n"] for count in facts["broken"].values()], marker="o", label=name)
    axes.set(xlabel="strength", ylabel="share of broken answers", ylim=(-0.05, 1.05))
    axes.legend(fontsize=6)
    save_figure(figure, path)


def analysis(found: Facts, path: Path) -> None:
    """Spread over coordinates, stability under resampling, and cosines between layers of one method."""
    figure = new_figure(12, 3.6)
    spread, stability, cosines = figure.subplots(1, 3)
    for method, rows in found["spread"].items():
        spread.plot([row["largest"] for row in rows], marker=".", label=method)
    spread.axhline(found["even"], color="grey", linestyle=":", label="even vector")
    spread.set(xlabel="layer", ylabel="share in the ten largest coordinates", ylim=(0, None))
    spread.legend(fontsize=6)
    places = sorted(map(int, found["stability"]))
    for method in found["spread"]:
        rows = [found["stability"][str(layer)][method] for layer in places]
        if rows:
            line = stability.plot(places, [row["mean"] for row in rows], marker="o", label=method)[0]
            stability.fill_between(
                places, [row["low"] for row in rows], [row["mean"] for row in rows], color=line.get_color(), alpha=0.15
            )
    stability.set(xlabel="layer", ylabel="cosine with resampled vectors", ylim=(None, 1.02))
    if places:
        stability.legend(fontsize=6)
    method, matrix = next(reversed(found["layers"].items()))
    image = cosines.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    cosines.set(xlabel="layer", ylabel="layer", title=f"cosines of {method} between layers")
    figure.colorbar(image, ax=cosines)
    save_figure(figure, path)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
