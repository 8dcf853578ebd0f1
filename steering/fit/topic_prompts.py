"""The prompts of a topic fit: read from files or the registry, without repeats, and cut into fit, calibration and test.

What is to be refused for safety is never taken for the topic, and nothing that the registry holds for testing is left.
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from steering.errors import DatasetError, DatasetMisuse, PromptFileError, TooFewPrompts
from steering.fit.catalog import CATALOG
from steering.fit.datasets import DataDirectory, Record, deduplicate, held_records
from steering.fit.sources import Label, Use
from steering.fit.topic_files import read_prompts
from steering.fit.topic_settings import TopicSettings


class Role(StrEnum):
    """What a prompt was given as; which class it is in is for the judge to say.

    `SAFETY` prompts are to stay refused, and come first where a prompt has several roles. `INDUCED` ones are those that
    `--purpose induce` is to have refused. `NEUTRAL` ones only say where the neutral point lies.
    """

    SAFETY = "safety"
    INDUCED = "induced"
    REFUSED = "refused"
    ANSWERED = "answered"
    NEUTRAL = "neutral"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicPrompt:
    """One prompt.

    Attributes:
        key: `<source>/<id>`, unique; in a file the id is a digest of the text.
        source: file name, or `<set>/<part>` of the registry.
        use: what it may be used for.
    """

    key: str
    text: str
    role: Role
    source: str
    use: Use


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicPrompts:
    """All prompts of a fit, and how many were dropped for what reason."""

    items: tuple[TopicPrompt, ...]
    dropped: Mapping[str, int]

    def where(self, roles: Iterable[Role], uses: Iterable[Use] = tuple(Use)) -> list[int]:
        """Indices of the prompts with one of these roles and uses."""
        roles, uses = set(roles), set(uses)
        return [index for index, one in enumerate(self.items) if one.role in roles and one.use in uses]

    def counts(self) -> dict[str, dict[str, int]]:
        """Prompts by role and use."""
        found: dict[str, dict[str, int]] = {}
        for (role, use), count in sorted(Counter((one.role, one.use) for one in self.items).items()):
            found.setdefault(role, {})[use] = count
        return found

    def to_json(self) -> dict[str, Any]:
        """For the stage's file."""
        return {
            "counts": self.counts(),
            "sources": dict(sorted(Counter(one.source for one in self.items).items())),
            "dropped": dict(self.dropped),
            "prompts": [asdict(one) for one in self.items],
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> TopicPrompts:
        """Read what `to_json` gave."""
        items = tuple(
            TopicPrompt(**{**one, "role": Role(one["role"]), "use": Use(one["use"])}) for one in facts["prompts"]
        )
        return cls(items=items, dropped=facts["dropped"])


class _Read(NamedTuple):
    """A record as it was read; `source` is a file name or `<set>/<part>`."""

    record: Record
    role: Role
    use: Use
    source: str


def gather(sources: Mapping[Role, Sequence[str]], settings: TopicSettings, directory: DataDirectory) -> TopicPrompts:
    """Read every source of every role, drop repeats and what is held for testing, and cut the rest by use.

    Args:
        sources: paths of files, or `<set>/<part>` of the registry, by role.

    Raises:
        PromptFileError: a file cannot be read, or a name is neither a file nor a part of the registry.
        DatasetMisuse: a part of the registry may not be fitted on.
        TooFewPrompts: refused or answered prompts are missing, or too few to fit and calibrate on.
    """
    read: list[_Read] = []
    dropped: dict[str, int] = {}
    is_registered = False
    for role in Role:
        for name in sources.get(role, ()):
            if not Path(name).is_file():
                is_registered = True
            found = _read(name, role, settings, directory)
            kept = _first(found, settings)
            if len(kept) < len(found):
                dropped[f"{name}: beyond {settings.most} of one source"] = len(found) - len(kept)
            read += kept
    left = deduplicate([one.record for one in read], protected=_protected(directory, is_needed=is_registered))
    known = {id(one.record): one for one in read}
    items = tuple(
        TopicPrompt(key=record.key, text=record.prompt, role=one.role, source=one.source, use=one.use)
        for record in left.records
        for one in [known[id(record)]]
    )
    prompts = TopicPrompts(items=items, dropped={**dropped, **left.dropped})
    _require(prompts, settings)
    return prompts


def _read(name: str, role: Role, settings: TopicSettings, directory: DataDirectory) -> list[_Read]:
    path = Path(name)
    if path.is_file():
        records = [_record(path, role, text) for text in read_prompts(path)]
        return [_Read(record, role, _use(record.key, settings), path.name) for record in records]
    dataset, _, part = name.partition("/")
    known = {entry.name: [one.name for one in entry.parts] for entry in CATALOG}
    if dataset not in known or part not in known[dataset]:
        parts = ", ".join(f"{dataset}/{one}" for one in known.get(dataset, ()))
        raise PromptFileError(
            f"{name!r} is neither a file nor a part of the registry; "
            + (f"parts of {dataset}: {parts}" if parts else f"give a path, or <set>/<part> of {sorted(known)}")
        )
    entry = next(one for one in CATALOG if one.name == dataset)
    shares = next(one for one in entry.parts if one.name == part).shares
    if Use.FIT not in shares:
        raise DatasetMisuse(
            f"{name} may not be fitted on; it is registered for: {', '.join(shares)}; a bundle is tested on it "
            "afterwards, by `trimtab eval`"
        )
    found = [_Read(one, role, _use(one.key, settings), name) for one in directory.load(dataset, part, Use.FIT)]
    if Use.CALIBRATE in shares:
        # Never fitted on, whatever a hash says of them.
        calibrating = directory.load(dataset, part, Use.CALIBRATE)
        found += [_Read(one, role, Use.CALIBRATE, name) for one in calibrating]
    return [one for one in found if one.record.label is not Label.PHRASE]


def _record(path: Path, role: Role, text: str) -> Record:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Record(key=f"{path.name}/{digest}", dataset=path.name, part=role.value, prompt=text, label=Label.SENSITIVE)


def _use(key: str, settings: TopicSettings) -> Use:
    # Salted, because the registry cuts its own shares by a hash of the same key.
    place = int(hashlib.sha256(f"topics/{key}".encode()).hexdigest()[:13], 16) / 16**13
    if place < settings.test_share:
        return Use.TEST
    return Use.CALIBRATE if place < settings.test_share + settings.calibration_share else Use.FIT


def _first(found: list[_Read], settings: TopicSettings) -> list[_Read]:
    """At most `most`, by a hash of their keys: the same on every machine, in their own order."""
    if len(found) <= settings.most:
        return found
    order = sorted(found, key=lambda one: hashlib.sha256(f"{settings.seed}/{one.record.key}".encode()).digest())
    kept = {one.record.key for one in order[: settings.most]}
    return [one for one in found if one.record.key in kept]


def _protected(directory: DataDirectory, *, is_needed: bool) -> list[Record]:
    """What the registry holds for testing; without registered sources only where it is all at hand."""
    if is_needed:
        return held_records(directory)
    try:
        return held_records(replace(directory, may_download=False))
    except DatasetError:
        return []


def _require(prompts: TopicPrompts, settings: TopicSettings) -> None:
    counts = prompts.counts()
    for role in (Role.REFUSED, Role.ANSWERED):
        found = counts.get(role, {})
        for use in (Use.FIT, Use.CALIBRATE):
            if found.get(use, 0) < settings.least:
                raise TooFewPrompts(
                    f"--{role} gives {sum(found.values())} prompts once repeats are dropped, {found.get(use, 0)} of "
                    f"them to {use} on; at least {settings.least} are needed (about {_whole(settings)} in all); "
                    f"dropped: {dict(prompts.dropped) or 'none'}"
                )
    if settings.purpose.induces and not counts.get(Role.INDUCED):
        raise TooFewPrompts("--purpose induce needs the prompts that are to be refused: give files by --induced")


def _whole(settings: TopicSettings) -> int:
    return round(settings.least / max(0.01, settings.calibration_share) * 1.5)
