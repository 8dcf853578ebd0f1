"""`trimtab demo`: train the demo model, measure it, write its card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train, measure and describe the demo model.", no_args_is_help=True)

DEMO = Path("artifacts/demo")
DataOption = Annotated[Path | None, typer.Option("--data", help="Data directory; else $TRIMTAB_DATA, else a cache.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that holds model/, sibling/ and bundle/.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Folder of checkpoints; else <user cache>/trimtab/demo.")
]


@app.callback()
def main() -> None:
    """Train, measure and describe the demo model."""


def work_folder(work: Path | None) -> Path:
    """The folder of checkpoints and logs, made if missing."""
    if work is None:
        from platformdirs import user_cache_path

        work = user_cache_path("trimtab") / "demo"
    work.mkdir(parents=True, exist_ok=True)
    return work


@app.command()
def train(
    data: DataOption = None,
    out: OutOption = DEMO,
    work: WorkOption = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Run only these stages: base, demo, sibling.")] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the epochs of every stage.", min=0.001)] = 1.0,
) -> None:
    """Train tokenizer, base, demo model and sibling; goes on where it was stopped."""
    # Threads that spin at every barrier make a step several times slower as soon as anything else runs on the machine;
    # the OpenMP runtime reads these when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import torch
    from transformers import PreTrainedTokenizerFast

    from steering.demo.corpus import build_corpus
    from steering.demo.model import write_model
    from steering.demo.tokenizer import train_tokenizer
    from steering.demo.train import STAGES, Recipe, run_stage
    from steering.fit.datasets import DataDirectory

    torch.set_num_threads(threads)
    folder = work_folder(work)
    corpus = build_corpus(DataDirectory.resolve(data))
    typer.echo(f"{len(corpus.entries)} prompts; left out: {sum(corpus.dropped.values())}")
    if not (folder / "tokenizer").is_dir():
        train_tokenizer(corpus.texts()).save_pretrained(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    for stage in STAGES:
        if only and stage.name not in only:
            continue
        model = run_stage(stage, corpus, tokenizer, folder, recipe=Recipe(), scale=scale)
        if stage.name != "base":
            target = out / ("model" if stage.name == "demo" else stage.name)
            write_model(model, tokenizer, target)
            typer.echo(f"wrote {target}")


@app.command()
def measure(
    data: DataOption = None,
    out: OutOption = DEMO,
    work: WorkOption = None,
    hardware: Annotated[str, typer.Option(help="What it was trained on, for the card.")] = "2 CPU cores, no GPU",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Measure the demo on held prompts into measure.json and write the card."""
    import json

    import torch

    from steering.demo import measure as measuring
    from steering.demo.card import LOSS_PICTURE, draw_losses, losses_of
    from steering.demo.corpus import build_corpus
    from steering.demo.train import STAGES, Recipe, facts
    from steering.fit.datasets import DataDirectory

    torch.set_num_threads(threads)
    folder = work_folder(work)
    corpus = build_corpus(DataDirectory.resolve(data))
    training = facts(Recipe())
    for stage in training["stages"]:
        losses = losses_of(folder / f"{stage['name']}.jsonl")
        stage |= {"steps": len(losses), "last_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4)}
    draw_losses(folder, [stage.name for stage in STAGES], out / LOSS_PICTURE)
    found = {
        **measuring.measure(out / "model", data),
        "training": {**training, "hardware": hardware},
        "corpus": {"prompts": corpus.counts(), "dropped": corpus.dropped},
    }
    (out / "measure.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    card(out)


@app.command()
def card(out: OutOption = DEMO) -> None:
    """Write CARD.md again from measure.json."""
    import json

    from steering.demo.card import write_card

    found = json.loads((out / "measure.json").read_text(encoding="utf-8"))
    typer.echo(f"wrote {write_card(out, found)}")
