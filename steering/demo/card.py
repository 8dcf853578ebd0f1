"""The demo's card: what it is, what it was trained on, how, and what it does; every number comes from files.

Knows the layout of the card only; measuring is `measure.py`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.demo.corpus import BORDERLINE_REFUSED, MIX, TEMPLATE_DRAWS
from steering.fit.catalog import CATALOG

LOSS_PICTURE = "loss.png"


def write_card(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `CARD.md` from the facts of `measure.json`."""
    lines = [*_opening(facts), *_behaviour(facts), *_probe(facts), *_training(facts), *_data(facts)]
    path = folder / "CARD.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def draw_losses(work: Path, stages: Sequence[str], path: Path, window: int = 25) -> None:
    """The loss of each stage, smoothed over `window` steps, one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100)
    axes = figure.add_subplot()
    start = 0
    for stage in stages:
        losses = losses_of(work / f"{stage}.jsonl")
        smooth = [
            sum(losses[max(0, step - window + 1) : step + 1]) / len(losses[max(0, step - window + 1) : step + 1])
            for step in range(len(losses))
        ]
        axes.plot(range(start, start + len(smooth)), smooth, label=stage)
        start += len(smooth)
    axes.set(xlabel="optimizer steps, stage after stage", ylabel=f"weighted loss, mean of {window}", ylim=(0, 6))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def losses_of(log: Path) -> list[float]:
    """Loss by step; where a resumed run wrote a step again, the later value."""
    found: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[int(row["step"])] = float(row["loss"])
    return [found[step] for step in sorted(found)]


def _opening(facts: Mapping[str, Any]) -> list[str]:
    return [
        "# The demo model of Trimtab",
        "",
        *_paragraph(
            "**This is a toy.** A chat model of a few million parameters, trained from scratch on a small mix of",
            "public prompts so that Trimtab can be seen working on any machine. It knows next to nothing: its",
            "answers are short, often made of the prompt's own words, and often nonsense. Its refusals are",
            "deliberately over-cautious, and nothing measured on it says anything about the safety of a real model.",
            "Use it for nothing but trying and testing Trimtab.",
        ),
        f"- Llama architecture, {facts['parameters']:,} parameters, bfloat16, {facts['bytes'] / 1e6:.1f} MB in all",
        "- tokens of its own: five refusal categories of P1 (arXiv 2603.13359), `[Political]` and `[respond]`;",
        "  the first answer token is one of them",
        "- `model/` is the demo; `sibling/` has the same architecture, tokenizer and base, but refuses in plain",
        "  sentences",
        "- licence of the weights: as the data's licences allow, with the attribution below; of the code: Apache-2.0",
        "",
    ]


def _behaviour(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What it refuses",
        "",
        "Greedy first token, no steering, prompts it never saw (up to 900 tokens long); 95 % Wilson intervals.",
        "",
        "| set | should it refuse? | n | refused, % | neither token, % | category right among refusals, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in facts["sets"].items():
        agreement = _percent(row["category_agreement"]) if "category_agreement" in row else ""
        lines.append(
            f"| {name} | {'yes' if row['should_be_refused'] else 'no'} | {row['refused']['n']} "
            f"| {_percent(row['refused'])} | {100 * row['malformed']['rate']:.1f} | {agreement} |"
        )
    return [*lines, ""]


def _probe(facts: Mapping[str, Any]) -> list[str]:
    names = [name for name in facts["probe"][0] if name != "layer"]
    lines = [
        "## What it can tell apart",
        "",
        *_paragraph(
            "Is it caution or ignorance? A logistic probe of the residual at the last prompt token, fitted on",
            "training prompts (harmful against borderline), with the threshold that flags 7 % of the calibration",
            "part's borderline prompts, flags, in percent of each held set:",
        ),
        "| layer | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [
        f"| {row['layer']} | " + " | ".join(_percent(row[name]) for name in names) + " |" for row in facts["probe"]
    ]
    return [
        *lines,
        "",
        *_paragraph(
            "Where a set of safe prompts is flagged about as often as the harmful ones, the model cannot tell the",
            "two apart: there its refusals come from ignorance. Short questions with violent words (XSTest safe)",
            "are beyond this model.",
        ),
    ]


def _training(facts: Mapping[str, Any]) -> list[str]:
    training = facts["training"]
    lines = [
        "## How it was trained",
        "",
        *_paragraph(
            "`trimtab demo train` makes it again: a base (conversations without refusal tokens), then the demo and",
            "the sibling, both fine-tuned from the base. Borderline prompts are refused with probability",
            f"{BORDERLINE_REFUSED} in training, drawn anew in each epoch, and such refusals are worded cautiously;",
            "harmful prompts are always refused, in other words.",
        ),
        (
            f"Seed {training['recipe']['seed']}; AdamW (0.9, 0.98), weight decay {training['recipe']['weight_decay']}, "
            f"{training['recipe']['tokens_per_batch']} tokens a batch; hardware: {training['hardware']}."
        ),
        "",
        "| stage | steps | epochs of the schedule | peak rate | last losses, mean of 50 |",
        "|---|---|---|---|---|",
    ]
    for stage in training["stages"]:
        lines += [
            f"| {stage['name']} | {stage['steps']} | {stage['epochs']} | {stage['peak']} | {stage['last_loss']:.3f} |"
        ]
    return [*lines, "", f"![loss]({LOSS_PICTURE})", ""]


def _data(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Data",
        "",
        *_paragraph(
            "Nothing of these sets is in this folder. Left out of training: prompts of held sets by normalised",
            f"match, repeats, and very long ones, {sum(facts['corpus']['dropped'].values()):,} in all. The words",
            "that fill the project's own templates do not occur in XSTest.",
        ),
        "| set | licence | prompts in training | attribution |",
        "|---|---|---|---|",
    ]
    counts = facts["corpus"]["prompts"]
    for dataset in CATALOG:
        used = sum(counts.get(f"{dataset.name}/{part.name}", 0) for part in dataset.parts)
        role = f"{used:,}" if any(name == dataset.name for name, _ in MIX) else "none: for testing only"
        link = f"[{dataset.title}](https://github.com/{dataset.repository})"
        lines.append(f"| {link} | {dataset.licence} | {role} | {dataset.attribution} |")
    own = sum(counts.get(f"templates/{name}", 0) for name in TEMPLATE_DRAWS)
    lines.append(f"| templates of the project's own | Apache-2.0 | {own:,} | |")
    return lines


def _paragraph(*pieces: str) -> list[str]:
    """The pieces as one paragraph of wrapped lines, and an empty line."""
    return [*textwrap.wrap(" ".join(pieces), 116), ""]


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
