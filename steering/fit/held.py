"""Stage `held`: what every profile does on prompts that nothing was fitted or chosen on. Reported, never used.

Through transformers, read from the beginning of greedy answers; `trimtab eval` measures the same over the served API.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steering.fit.activations import last_residuals_at
from steering.fit.arms import Codes
from steering.fit.comparison import graded_shares
from steering.fit.control import Fit
from steering.fit.datasets import Record, deduplicate, held_records, thinned
from steering.fit.families import Family
from steering.fit.gating import Readings, family_codes, gated, token_categories
from steering.fit.intervals import Rate
from steering.fit.openings import Openings
from steering.fit.probes import histogram, roc
from steering.fit.probing import read
from steering.fit.prompts import LONGEST
from steering.gate import Probe
from steering.terms import Edit

ATTACKS = ("aim", "autodan", "cipher", "jailbroken", "pair", "renellm")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSet:
    """One set of the report; `kind` is `over`, `refuse`, `attack`, `political` or `plain`."""

    name: str
    dataset: str
    part: str
    kind: str


HELD_SETS = (
    HeldSet(name="XSTest safe", dataset="xstest", part="safe", kind="over"),
    HeldSet(name="CoCoNot contrast", dataset="coconot", part="contrast", kind="over"),
    HeldSet(name="JailbreakBench benign", dataset="jailbreakbench", part="benign", kind="over"),
    HeldSet(name="OR-Bench borderline, held part", dataset="or_bench_borderline", part="all", kind="over"),
    HeldSet(name="XSTest unsafe", dataset="xstest", part="unsafe", kind="refuse"),
    HeldSet(name="CoCoNot, test part", dataset="coconot", part="eval", kind="refuse"),
    HeldSet(name="JailbreakBench harmful", dataset="jailbreakbench", part="harmful", kind="refuse"),
    *(HeldSet(name=f"attack {attack}", dataset="alphasteer_attacks", part=attack, kind="attack") for attack in ATTACKS),
    HeldSet(name="CCP-sensitive, sampled test", dataset="ccp_sensitive", part="sampled_test", kind="political"),
    HeldSet(name="CAST harmless, test part", dataset="cast_conditions", part="harmless_test", kind="plain"),
    HeldSet(name="GSM8K test", dataset="gsm8k", part="test", kind="plain"),
    HeldSet(name="GPTeacher code, test part", dataset="gpteacher", part="codegen", kind="plain"),
    HeldSet(name="GPTeacher role-play, test part", dataset="gpteacher", part="roleplay", kind="plain"),
)
POOLS = {
    "over-refusal, pooled": "over",
    "should refuse, pooled": "refuse",
    "attacks, pooled": "attack",
    "plain, pooled": "plain",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A profile as it is measured: its edits and its thresholds."""

    family: Family
    comply_below: float
    refuse_above: float
    is_graded: bool = False
    reads_tokens: bool = False


def held_stage(
    fit: Fit,
    openings: Openings,
    probe: Probe,
    profiles: Mapping[str, Gated],
    edits: Mapping[str, Edit],
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Refusals of every held set: unsteered, under each profile's gate, and with each side forced."""
    chosen = _records(fit)
    prompts = {"digest": hashlib.sha256("\n".join(record.prompt for _, record in chosen).encode()).hexdigest()}

    def make() -> dict[str, Any]:
        ids = fit.loaded.prompts([record.prompt for _, record in chosen])
        kept = [row for row, prompt in enumerate(ids) if len(prompt) <= LONGEST]
        places = np.array([chosen[row][0] for row in kept])
        ids = [ids[row] for row in kept]
        residuals = last_residuals_at(fit.loaded, ids, probe.layer)
        probability, head = read(probe, residuals)
        readings = Readings(probability=probability, head=head, tokens=token_categories(fit, openings, ids))
        result: dict[str, Any] = {"sets": {}, "pools": {}, "decisions": {}}
        codes = _codes(fit, openings, ids, readings, profiles, edits)
        for place, held in enumerate(HELD_SETS):
            rows = places == place
            if rows.any():
                result["sets"][held.name] = {
                    "kind": held.kind,
                    "n": int(rows.sum()),
                    "refused": {arm: _rate(found, rows) for arm, found in codes.items()},
                    "probability": histogram(probability[rows]),
                }
        kinds = np.array([HELD_SETS[place].kind for place in places])
        for name, kind in POOLS.items():
            rows = kinds == kind
            if rows.any():
                result["pools"][name] = {arm: _rate(found, rows) for arm, found in codes.items()}
        contested = np.isin(kinds, ["over", "refuse"])
        if len(set(kinds[contested])) == 2:
            points, area = roc(probability[contested], kinds[contested] == "refuse", np.ones(int(contested.sum())))
            step = max(1, len(points) // 100)
            result["probe"] = {"area": area, "roc": [list(point) for point in points[::step]]}
        return {**result, "left_out": {f"longer than {LONGEST} tokens": len(chosen) - len(kept)}}

    return fit.stage("held", make, of=("held", "held_contested"), after=[*after, prompts])


def _codes(
    fit: Fit,
    openings: Openings,
    ids: list[list[int]],
    readings: Readings,
    profiles: Mapping[str, Gated],
    edits: Mapping[str, Edit],
) -> dict[str, Codes]:
    """By arm: `unsteered`, each profile behind its gate, and each profile with a side forced."""
    result: dict[str, Codes] = {}
    # Profiles that differ in their edits alone share their passes.
    alike: dict[tuple[bool, tuple[float, float] | None], dict[str, Gated]] = {}
    for name, profile in profiles.items():
        graded = (profile.comply_below, profile.refuse_above) if profile.is_graded else None
        alike.setdefault((profile.reads_tokens, graded), {})[name] = profile
    for (reads_tokens, graded), members in alike.items():
        placed = readings.tokens if reads_tokens and readings.tokens is not None else readings.head
        seen = Readings(probability=readings.probability, head=placed, tokens=None)
        strengths = None if graded is None else torch.from_numpy(graded_shares(readings.probability, *graded)).float()
        families = {name: profile.family for name, profile in members.items()}
        codes = family_codes(fit, openings, ids, seen, families, edits, strengths)
        for name, profile in members.items():
            sides = codes["unsteered"], codes[f"{name}/comply"], codes[f"{name}/refuse"]
            behind = gated(readings.probability, *sides, profile.comply_below, profile.refuse_above)
            result |= {"unsteered": sides[0], name: behind, f"{name}, comply": sides[1], f"{name}, refuse": sides[2]}
    return result


def _rate(codes: Codes, rows: NDArray[np.bool_]) -> dict[str, float | int]:
    return Rate(count=int((codes[rows] >= 0).sum()), n=int(rows.sum())).to_json()


def _records(fit: Fit) -> list[tuple[int, Record]]:
    """Held records with the place of their set in `HELD_SETS`, evenly spaced ones where a set has more."""
    held = deduplicate(held_records(fit.directory)).records
    found: list[tuple[int, Record]] = []
    for place, chosen in enumerate(HELD_SETS):
        records = [record for record in held if (record.dataset, record.part) == (chosen.dataset, chosen.part)]
        most = fit.settings.held_contested if chosen.kind in ("over", "refuse") else fit.settings.held
        found += [(place, record) for record in thinned(records, most)]
    return found
