"""The prompts of a control fit: which parts of which sets, what kind each prompt is, and how it is weighed.

Fitting and calibration prompts are disjoint, and neither holds a prompt that is for testing. Knows nothing of layers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steering.errors import OperatorError
from steering.fit.categories import POLITICAL, SAFETY, refusal_category
from steering.fit.control import Fit
from steering.fit.datasets import Record, fit_records, held_records, normalised, thinned
from steering.fit.everyday import EVERYDAY
from steering.fit.probes import Array, balanced
from steering.fit.sources import Label, Use

REFUSED_PARTS: tuple[tuple[str, str], ...] = (
    ("coconot", "eval"),
    ("catqa", "all"),
    ("harmfulqa", "harmfulqa"),
    ("harmfulqa", "dangerousqa"),
    ("advbench", "all"),
    ("ailuminate_demo", "all"),
    ("cast_conditions", "harmful"),
    ("ccp_sensitive", "train"),
    ("deccp", "censored"),
)
CONTRAST_PARTS: tuple[tuple[str, str], ...] = (("coconot", "pref"), ("or_bench_borderline", "all"))
"""Prompts to answer that look like those to refuse: P1 takes CoCoNot's contrast set, which is for testing here."""

PLAIN_PARTS: tuple[tuple[str, str], ...] = (
    ("gpteacher", "roleplay"),
    ("gpteacher", "codegen"),
    ("cast_conditions", "harmless"),
    ("gsm8k", "train"),
)
"""Plainly benign prompts, most with answers."""

EVERYDAY_PARTS: tuple[tuple[str, str], ...] = (("cast_conditions", "harmless"),)
"""Plain prompts that look most like those to refuse. Their rows repeat few prompts, so that after deduplication no row
dealt to calibration is left: here the prompts that may be fitted on are dealt instead, half to either use."""

OTHER_PARTS: tuple[tuple[str, str], ...] = (
    ("deccp", "uncensored"),
    ("deccp", "other"),
    ("cast_conditions", "topics_base"),
)
PARTS = (*REFUSED_PARTS, *CONTRAST_PARTS, *PLAIN_PARTS, *OTHER_PARTS)

EVERYDAY_SOURCE = "templates/everyday instruction"
"""Where the project's own everyday instructions are counted."""

LONGEST = 600
"""Most tokens of a fit prompt; longer ones are left out, which the report counts."""


class Kind(StrEnum):
    """What should become of a prompt: refused, answered though it looks harmful, or answered."""

    REFUSE = "refuse"
    OVER = "over"
    PLAIN = "plain"


GROUP_KINDS: dict[str, str] = {
    "harmful": Kind.REFUSE,
    "noncompliance": Kind.REFUSE,
    "borderline": Kind.OVER,
    "contrast": Kind.OVER,
    "plain": Kind.PLAIN,
    "everyday": Kind.PLAIN,
}
"""Groups of calibration prompts that the gate is chosen on. Political ones are scored but decide nothing: whether they
should be refused is what users of this model disagree on."""


class Prompt(NamedTuple):
    """One prompt of the fit.

    Attributes:
        source: `<set>/<part>`.
        category: whose refusal it would be; None for plain prompts.
        group: the group of `GROUP_KINDS` it is counted in while calibrating; "political" otherwise.
        ids: tokens up to and including the assistant's header.
        answer: tokens of a given answer, where the set has one.
    """

    key: str
    source: str
    kind: Kind
    label: str
    category: str | None
    group: str
    ids: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts for one use, and the counts of what was left out."""

    items: tuple[Prompt, ...]
    dropped: dict[str, int]

    @property
    def ids(self) -> list[list[int]]:
        """Tokens of each prompt."""
        return [prompt.ids for prompt in self.items]

    @property
    def is_refused(self) -> NDArray[np.bool_]:
        """[N], whether each should be refused."""
        return np.array([prompt.kind is Kind.REFUSE for prompt in self.items], dtype=bool)

    @property
    def sources(self) -> NDArray[np.str_]:
        """[N]."""
        return np.array([prompt.source for prompt in self.items], dtype=np.str_)

    @property
    def groups(self) -> NDArray[np.str_]:
        """[N]."""
        return np.array([prompt.group for prompt in self.items], dtype=np.str_)

    @property
    def digest(self) -> str:
        """SHA-256 of all that a stage may read of them: results made from other prompts are made again."""
        told = [list(prompt) for prompt in self.items]
        return hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Prompts of each source."""
        return dict(sorted(Counter(prompt.source for prompt in self.items).items()))

    def where(self, kind: Kind) -> list[int]:
        """Indices of the prompts of a kind."""
        return [index for index, prompt in enumerate(self.items) if prompt.kind is kind]


def fitting_prompts(fit: Fit) -> Prompts:
    """What vectors, probe and covariance are fitted on: at most `most_per_set` of each part, evenly spaced."""
    left = fit_records(fit.directory, PARTS, without=fit.settings.without)
    prompts = _prompts(fit, _capped(fit, [record for record in left.records if not _calibrates(record)]))
    dropped = dict(left.dropped)
    if fit.settings.has_templates:
        everything = fit_records(fit.directory, PARTS) if fit.settings.without else left
        taken = {normalised(record.prompt) for record in everything.records}
        prompts += _templates(fit, taken)
        prompts += _everyday(fit, taken)
    return _short(prompts, dropped)


def calibration_prompts(fit: Fit) -> Prompts:
    """What layers, doses and thresholds are chosen on: at most `gated` of each group."""
    left = fit_records(fit.directory, PARTS, Use.CALIBRATE, without=fit.settings.without)
    dealt = fit_records(fit.directory, EVERYDAY_PARTS, without=fit.settings.without).records
    everyday = [record for record in dealt if _calibrates(record)]
    by_group: dict[str, list[Record]] = {}
    for record in (*left.records, *everyday):
        by_group.setdefault(_group(record), []).append(record)
    chosen = [record for records in by_group.values() for record in sampled(records, fit, fit.settings.gated)]
    return _short(_prompts(fit, chosen), dict(left.dropped))


def sampled(records: Sequence[Record], fit: Fit, most: int) -> list[Record]:
    """At most `most` records in an order given by a hash of their keys: the same on every machine."""
    seed = fit.settings.seed
    ordered = sorted(records, key=lambda record: hashlib.sha256(f"{seed}/{record.key}".encode()).digest())
    return ordered[:most]


def prompt_weights(fit: Fit, prompts: Prompts) -> Array:
    """[N] with mean 1: either side weighs half; on a side every source weighs the same, times the settings' factors."""
    factors = dict(fit.settings.weights)
    plain = factors.pop("plain", 1.0)
    for prompt in prompts.items:
        if prompt.kind is Kind.PLAIN:
            factors.setdefault(prompt.source, plain)
    return balanced(prompts.sources, prompts.is_refused, factors)


def p1_prompts(fit: Fit, prompts: Prompts, indices: Sequence[int]) -> list[int]:
    """Those of these prompts that Algorithms 1 and 2 see; see `Settings.p1_sources`."""
    wanted = fit.settings.p1_sources
    return [index for index in indices if wanted is None or prompts.items[index].source in wanted] or list(indices)


def require_classes(prompts: Prompts, categories: Iterable[str]) -> None:
    """Raises OperatorError where a category, or the plain prompts, have nothing to be fitted on."""
    found = {prompt.category for prompt in prompts.items if prompt.kind is Kind.REFUSE}
    empty = [name for name in categories if name not in found]
    if empty or not prompts.where(Kind.PLAIN):
        raise OperatorError(
            f"a class of the fit has no prompts in the data directory: {empty or 'plain prompts'}; check the "
            "registry's sets, or name the categories to fit"
        )


def _capped(fit: Fit, records: Sequence[Record]) -> list[Record]:
    parts: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        parts.setdefault((record.dataset, record.part), []).append(record)
    most = {part: fit.settings.most_plain if part in PLAIN_PARTS else fit.settings.most_per_set for part in parts}
    return [record for part, members in parts.items() for record in thinned(members, most[part])]


def _prompts(fit: Fit, records: Sequence[Record]) -> list[Prompt]:
    return [
        Prompt(
            key=record.key,
            source=f"{record.dataset}/{record.part}",
            kind=_kind(record),
            label=record.label,
            category=_category(fit, record),
            group=_group(record),
            ids=fit.loaded.prompt(record.prompt),
            answer=fit.loaded.tokenizer.encode(record.answer or "", add_special_tokens=False),
        )
        for record in records
        if record.label is not Label.PHRASE
    ]


def _templates(fit: Fit, taken: set[str]) -> list[Prompt]:
    """The project's own prompts: patterns of figures of speech and the like, none with a content word of XSTest."""
    from steering.demo.corpus import build_corpus

    entries = [entry for entry in build_corpus(fit.directory).entries if entry.source.startswith("templates/")]
    by_source: dict[str, list[Prompt]] = {}
    for number, entry in enumerate(entries):
        if normalised(entry.prompt) in taken:
            continue
        kind = Kind.PLAIN if entry.category is None else Kind.OVER if entry.is_borderline else Kind.REFUSE
        prompt = Prompt(
            key=f"{entry.source}/{number}",
            source=entry.source,
            kind=kind,
            label=Label.HARMFUL if kind is Kind.REFUSE and entry.category == SAFETY else Label.NONCOMPLIANCE,
            category=entry.category if entry.category in fit.categories else None,
            group="templates",
            ids=fit.loaded.prompt(entry.prompt),
            answer=[],
        )
        by_source.setdefault(entry.source, []).append(prompt)
    most = fit.settings.most_templates
    return [
        members[index * len(members) // most] if len(members) > most else members[index]
        for members in by_source.values()
        for index in range(min(most, len(members)))
    ]


def _everyday(fit: Fit, taken: set[str]) -> list[Prompt]:
    """The project's own everyday instructions, without those that a data set has, for whatever use."""
    held = {normalised(record.prompt) for record in held_records(fit.directory)}
    return [
        Prompt(
            key=f"{EVERYDAY_SOURCE}/{number}",
            source=EVERYDAY_SOURCE,
            kind=Kind.PLAIN,
            label=Label.BENIGN,
            category=None,
            group="templates",
            ids=fit.loaded.prompt(text),
            answer=[],
        )
        for number, text in enumerate(EVERYDAY)
        if normalised(text) not in taken | held
    ]


def _calibrates(record: Record) -> bool:
    """Whether a prompt of `EVERYDAY_PARTS` is calibrated on instead of fitted on: a hash of its text says."""
    if (record.dataset, record.part) not in EVERYDAY_PARTS:
        return False
    return hashlib.sha256(normalised(record.prompt).encode()).digest()[0] % 2 == 0


def _short(prompts: list[Prompt], dropped: dict[str, int]) -> Prompts:
    kept = tuple(prompt for prompt in prompts if len(prompt.ids) <= LONGEST)
    if not kept:
        raise OperatorError("a fit has no prompts in the data directory; check the registry's sets")
    if len(kept) < len(prompts):
        dropped[f"longer than {LONGEST} tokens"] = len(prompts) - len(kept)
    return Prompts(items=kept, dropped=dropped)


def _kind(record: Record) -> Kind:
    if record.label in (Label.HARMFUL, Label.NONCOMPLIANCE, Label.SENSITIVE):
        return Kind.REFUSE
    if record.label is Label.BORDERLINE or record.dataset == "deccp":
        return Kind.OVER
    return Kind.PLAIN


def _category(fit: Fit, record: Record) -> str | None:
    category = refusal_category(record)
    return category if category in fit.categories else None


def _group(record: Record) -> str:
    if (record.dataset, record.part) in EVERYDAY_PARTS:
        return "everyday"
    if refusal_category(record) == POLITICAL:
        return "political"
    if record.label is Label.HARMFUL and record.dataset != "coconot":
        return "harmful"
    if record.dataset == "coconot":
        return "contrast" if _kind(record) is Kind.OVER else "noncompliance"
    return {Kind.REFUSE: "harmful", Kind.OVER: "borderline", Kind.PLAIN: "plain"}[_kind(record)]
