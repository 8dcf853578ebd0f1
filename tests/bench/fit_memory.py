"""Fit memory: how much `fit control` takes beyond a model as deep and as wide as one of 8B, over 12,000 prompts.

`python -m tests.bench.fit_memory` makes a random Llama of 32 blocks of width 4096 whose heads, inner layers and
vocabulary are small, so that residuals are of full size and passes take minutes on a CPU; prompts are random tokens.
A process of its own runs the stages that see the residuals of all prompts, those with matrices of the width squared,
and the response probe. Each stage's peak of resident memory, mapped files included, is told less what the process held
with the model loaded. Takes about 10 GB of disk and some minutes of a quiet CPU. Results are in `tests/bench/results/`.

`--drawn` draws the residuals instead of running the model over the prompts, which is what takes long: every other stage
is measured as before.

What the tokens of one pass take does not show here: `steering.fit.passes` holds it to `PASS_BYTES`, of which
`tests/unit/fit/test_passes.py` is the test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.report import load, machine

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent / "artifacts" / "demo" / "model"
LAYERS, WIDTH = 32, 4096
PROMPTS, CALIBRATING, ANSWERS = 12_000, 2_000, 1_200
SWEPT = 4
"""Layers that the probe is fitted at: each is forgotten before the next."""
LAYER = 12
LIMIT_MB = 2_000


def main() -> None:
    """Measure in a process of its own and write the file; fails above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--drawn", action="store_true", help="draw residuals instead of running the model for them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child is not None:
        print(json.dumps(run(told.child, told.prompts, is_drawn=told.drawn)))  # noqa: T201 - the parent reads it
        return
    before = load()
    with tempfile.TemporaryDirectory(prefix="fit-memory-") as folder:
        command = [sys.executable, "-m", "tests.bench.fit_memory", "--child", folder]
        options = ["--prompts", str(told.prompts), *(["--drawn"] if told.drawn else [])]
        ended = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    now = datetime.now(UTC)
    document = {
        "measured": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "load_before": before,
        "fit_memory": found,
    }
    path = HERE / "results" / f"{now:%Y-%m-%dT%H%M%SZ}-fit-memory.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"at most {found['peak_beyond_mb']} MB beyond the model ({found['peak_stage']}); wrote {path}")  # noqa: T201
    if told.prompts >= PROMPTS and found["peak_beyond_mb"] > LIMIT_MB:
        raise SystemExit(f"over {LIMIT_MB} MB")


class Peaks:
    """Peaks of resident memory by stage, from the kernel's own high-water mark."""

    def __init__(self) -> None:
        self.base = resident("VmRSS")
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        began = time.monotonic()
        yield
        self.stages[name] = {
            "peak_beyond_mb": round((resident("VmHWM") - self.base) / 1e6),
            "after_mb": round((resident("VmRSS") - self.base) / 1e6),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(name, self.stages[name], file=sys.stderr, flush=True)  # noqa: T201 - it takes minutes


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(folder: Path, count: int, *, is_drawn: bool) -> dict[str, Any]:
    """Every stage, in the pipeline's order."""
    import torch

    from steering.fit.control import Fit, Preset, Variant, preset_settings
    from steering.fit.datasets import DataDirectory
    from steering.fit.generated import write_generated
    from steering.fit.learned import low_rank_stage, null_space_stage
    from steering.fit.openings import token_openings
    from steering.fit.probing import head_stage, probe_of, probe_stage, read
    from steering.fit.response import MOST_TOKENS, fit_response_probe
    from steering.fit.response_stage import candidate_layers
    from steering.fit.vectors import activations, categorical, class_means, cosines, pooled

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make_model(folder / "model")
    loaded = opened(folder / "model")
    settings = preset_settings(Preset.AUTO)
    fit = Fit(
        loaded=loaded,
        directory=DataDirectory(path=folder),
        work=folder / "work",
        settings=settings,
        say=lambda line: print(line, file=sys.stderr),  # noqa: T201 - it takes minutes
    )
    fitting, calibrating = made_up(fit, count, seed=1), made_up(fit, min(count, CALIBRATING), seed=2)
    openings = token_openings(loaded)
    peaks = Peaks()
    with peaks.stage("activations"):
        residuals = drawn(fit, fitting, calibrating) if is_drawn else activations(fit, fitting, calibrating)
    with peaks.stage("vectors"):
        means, facts = class_means(fit, openings, fitting, residuals.fitting, [residuals.facts])
    with peaks.stage("probe"):
        probed = probe_stage(fit, residuals, fitting, calibrating, SWEPT - 1, [residuals.facts])
    with peaks.stage("head"):
        head_stage(fit, residuals, fitting, calibrating, int(probed["layer"]), [probed])
    with peaks.stage("low_rank"):
        low_rank_stage(fit, openings, means, fitting, residuals.fitting, LAYER, [facts])
    with peaks.stage("null_space"):
        null_space_stage(fit, openings, means, fitting, residuals.fitting, LAYER, [facts])
    with peaks.stage("what gate and comparison read"):
        probe = probe_of(fit, int(probed["layer"]))
        read(probe, residuals.calibrating.layer(probe.layer))
        directions = {name: categorical(means, Variant.HEADER, name, LAYER, settings)[0] for name in fit.categories}
        cosines({**directions, "pooled": pooled(means, LAYER, settings)[0]})
    with peaks.stage("response"):
        asked = [fitting.items[index % count].ids for index in range(ANSWERS)]
        layers = candidate_layers(LAYERS)
        written = write_generated(
            loaded,
            asked,
            [ids[: MOST_TOKENS + 1] for ids in asked],
            fit.work,
            layers=layers,
            most=MOST_TOKENS,
            edits=[None] * len(asked),
        )
        refused = [index % 2 == 0 for index in range(len(asked))]
        fit_response_probe(written.layer, layers, written.mask, refused, [str(index) for index in range(len(asked))])
    highest = max(peaks.stages, key=lambda name: peaks.stages[name]["peak_beyond_mb"])
    return {
        "model": {
            "layers": LAYERS,
            "width": WIDTH,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "parameters_mb": round(sum(weight.nbytes for weight in loaded.model.parameters()) / 1e6),
        },
        "prompts": {"fit": count, "calibrate": len(calibrating.items), "answers": ANSWERS},
        "layers_swept": SWEPT,
        "residuals": "drawn at random" if is_drawn else "of the model",
        "residuals_on_disk_mb": round(residuals.facts["bytes"] / 1e6),
        "resident_with_model_mb": round(peaks.base / 1e6),
        "stages": peaks.stages,
        "peak_stage": highest,
        "peak_beyond_mb": peaks.stages[highest]["peak_beyond_mb"],
    }


def drawn(fit: Any, fitting: Any, calibrating: Any) -> Any:
    """What `activations` gives, with random residuals: apart by what is to be refused, and first tokens that say so."""
    import torch
    from safetensors.torch import save_file

    from steering.fit.prompts import Kind
    from steering.fit.shards import SHARD_BYTES, Shards
    from steering.fit.vectors import Activations

    size = SHARD_BYTES // (LAYERS * WIDTH * 4)
    written = []
    for name, prompts in (("fit", fitting), ("calibrate", calibrating)):
        files = []
        for start in range(0, len(prompts.items), size):
            part = prompts.items[start : start + size]
            refused = torch.tensor([prompt.kind is Kind.REFUSE for prompt in part])
            tokens = [fit.loaded.categories.get(prompt.category or "", fit.loaded.respond) for prompt in part]
            tensors = {"index": torch.arange(start, start + len(part)), "first_token": torch.tensor(tokens)}
            for layer in range(LAYERS):
                residuals = torch.randn(len(part), WIDTH)
                residuals[refused, :8] += 1.0
                tensors[f"layer.{layer}"] = residuals
            path = fit.work / f"drawn-{name}-{start:05d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
            files.append(path)
        written.append(Shards(files=tuple(files), count=len(prompts.items), layers=LAYERS, width=WIDTH))
    size = sum(path.stat().st_size for shards in written for path in shards.files)
    return Activations(fitting=written[0], calibrating=written[1], facts={"digest": "drawn", "bytes": size})


def make_model(path: Path) -> None:
    """A random Llama with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)


def opened(path: Path) -> Any:
    """The model, its weights read and every library that a pass needs loaded."""
    from steering.fit.activations import greedy, load_model
    from steering.fit.categories import CATEGORIES

    loaded = load_model(path, CATEGORIES)
    greedy(loaded, [[1, 2, 3]], new_tokens=2)
    return loaded


def made_up(fit: Any, count: int, seed: int) -> Any:
    """Prompts of 4 to 6 random tokens: half to refuse, over the categories, a quarter to answer, a quarter plain."""
    import random

    from steering.fit.prompts import Kind, Prompt, Prompts

    draw = random.Random(seed)
    vocabulary = len(fit.loaded.tokenizer)
    items = []
    for number in range(count):
        kind = (Kind.REFUSE, Kind.OVER, Kind.REFUSE, Kind.PLAIN)[number % 4]
        category = None if kind is Kind.PLAIN else fit.categories[number // 4 % len(fit.categories)]
        source, group = {
            Kind.REFUSE: ("catqa/all", "harmful"),
            Kind.OVER: ("or_bench_borderline/all", "borderline"),
            Kind.PLAIN: ("gsm8k/train", "plain"),
        }[kind]
        # The first half of the vocabulary for what is refused, so that there is something to tell.
        first, last = (10, vocabulary // 2) if kind is Kind.REFUSE else (vocabulary // 2, vocabulary)
        ids = [draw.randrange(first, last) for _ in range(draw.randint(4, 6))]
        answer = [draw.randrange(10, vocabulary) for _ in range(32)] if kind is Kind.PLAIN else []
        items.append(Prompt(f"made-up/{number}", source, kind, str(kind), category, group, ids, answer))
    return Prompts(items=tuple(items), dropped={})


if __name__ == "__main__":
    main()
