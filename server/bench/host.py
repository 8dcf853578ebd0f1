"""Host bench: what the plugin's own work per step costs on the host, without an engine.

One call of `Rows.write_step` per step is all the plugin does there; the rest is in the model's graph.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from server.bench.subject import Kind, Subject
from steering.engine.bank import Bank
from steering.engine.rows import Rows

STEPS, CHUNK = 2000, 50
BATCHES = ((1, 1), (64, 64), (256, 256), (256, 1), (256, 0))
"""(requests of a step, steered ones among them)."""

MOST = 10.0
"""Microseconds per steered request and step that are asked for."""


def measure(subject: Subject) -> list[dict[str, Any]]:
    """Microseconds per decode step, median over chunks of steps, by batch and steered requests."""
    return [_measured(subject, batch, steered) for batch, steered in BATCHES]


def line(found: dict[str, Any]) -> str:
    """One batch, for people."""
    each, verdict = found["microseconds_per_steered_request"], found["verdict"]
    asked = f", {each} per steered request, asked < {MOST:g}: {verdict}" if verdict else ""
    facts = f"{found['requests']} requests, {found['steered']} steered"
    return f"host: {facts}: {found['microseconds_per_step']} µs per step{asked}"


def _measured(subject: Subject, batch: int, steered: int) -> dict[str, Any]:
    manifest = subject.bundle.manifest
    layers = {layer for edit in manifest.edits for layer in edit.layers} | {probe.layer for probe in manifest.probes}
    width = manifest.model.hidden_size
    bank = Bank(layers=sorted(layers), width=width, terms=256, device=torch.device("cpu"))
    bank.load(subject.bundle)
    rows = Rows(bank=bank, requests=batch, tokens=8192, device=torch.device("cpu"))
    names = [f"request-{number}" for number in range(batch)]
    for name, plan in zip(names[:steered], subject.plans(max(1, steered), Kind.DISTINCT), strict=False):
        rows.add(name, plan, 32)
    tokens, computed = np.ones(batch, dtype=np.int32), np.full(batch, 32, dtype=np.int32)
    rows.write_step(names, tokens * 32, computed * 0)
    times = []
    for _ in range(STEPS // CHUNK):
        began = time.perf_counter()
        for _ in range(CHUNK):
            computed += 1
            rows.write_step(names, tokens, computed)
        times.append((time.perf_counter() - began) / CHUNK * 1e6)
    per_step = statistics.median(times)
    each = per_step / steered if steered else None
    # What is asked is asked of a batch that is steered: one steered among many pays for looking at all of them.
    is_asked = each is not None and steered == batch
    return {
        "requests": batch,
        "steered": steered,
        "microseconds_per_step": round(per_step, 2),
        "smallest": round(min(times), 2),
        "largest": round(max(times), 2),
        "microseconds_per_steered_request": None if each is None else round(each, 3),
        "verdict": "" if not is_asked or each is None else "met" if each < MOST else "missed",
    }
