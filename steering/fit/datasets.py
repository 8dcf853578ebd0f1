"""Data sets: finding their files, checking their digests, and handing out only what a use allows.

The law on what may be fitted on is the `shares` of `catalog.py`. Knows nothing of models or tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from steering.errors import DatasetCorrupt, DatasetMissing, DatasetMisuse
from steering.fit.catalog import CATALOG
from steering.fit.sources import DataSet, Label, Part, SourceFile, Use

Item = TypeVar("Item")

DATA_VARIABLE = "TRIMTAB_DATA"
_DOWNLOAD_SECONDS = 60.0
_MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One prompt of one part of a set.

    Attributes:
        key: `<set>/<part>/<row id>`, unique and stable.
        category: the set's own label (hazard, subject, CoCoNot category), None where it has none.
        answer: the answer the set gives, None where it has none.
    """

    key: str
    dataset: str
    part: str
    prompt: str
    label: Label
    category: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduplicated:
    """Records that are left, and how many of each part were dropped because of which other part."""

    records: tuple[Record, ...]
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataDirectory:
    """Where the files lie.

    Attributes:
        path: one folder per set.
        may_download: True only for the user's cache; an explicit directory is never written to.
    """

    path: Path
    may_download: bool = False

    @classmethod
    def resolve(cls, explicit: Path | None = None) -> DataDirectory:
        """The explicit directory, else `$TRIMTAB_DATA`, else the user's cache."""
        if explicit is not None:
            return cls(path=explicit)
        if named := os.environ.get(DATA_VARIABLE):
            return cls(path=Path(named))
        from platformdirs import user_cache_path

        return cls(path=user_cache_path("trimtab") / "data", may_download=True)

    def load(self, name: str, part: str, use: Use) -> list[Record]:
        """Records of one part that may serve `use`.

        Raises:
            DatasetMissing: a file is not here and cannot be fetched; says where it looked and how to get it.
            DatasetCorrupt: a file differs from the digest in the registry.
            DatasetMisuse: the part may not be used so.
        """
        dataset = find(name)
        chosen = _part(dataset, part)
        if use not in chosen.shares:
            allowed = ", ".join(chosen.shares)
            raise DatasetMisuse(f"{name}/{part} may not be used for {use}; it is registered for: {allowed}")
        source = next(file for file in dataset.files if file.name == chosen.file)
        text = self.read(dataset, source).decode("utf-8")
        return [
            Record(
                key=f"{name}/{part}/{row.id}",
                dataset=name,
                part=part,
                prompt=row.prompt,
                label=row.label,
                category=row.category,
                answer=row.answer,
            )
            for row in chosen.read(text)
            if row.prompt and use_of(chosen, f"{name}/{part}/{row.id}") is use
        ]

    def read(self, dataset: DataSet, source: SourceFile) -> bytes:
        """Bytes of one file, fetched first where that is allowed and needed, with the digest checked."""
        path = self.path / dataset.name / source.name
        if not path.is_file():
            if not self.may_download or source.address is None:
                raise DatasetMissing(_how_to_get(dataset, source, path, may_download=self.may_download))
            _download(dataset, source, path)
        payload = path.read_bytes()
        found = hashlib.sha256(payload).hexdigest()
        if found != source.sha256:
            raise DatasetCorrupt(
                f"{path} has sha256 {found}, the registry needs {source.sha256}; delete the file and get it again: "
                + _origin(dataset, source)
            )
        return payload


def find(name: str) -> DataSet:
    """The registered set `name`.

    Raises:
        DatasetMissing: no such set; lists the names there are.
    """
    for dataset in CATALOG:
        if dataset.name == name:
            return dataset
    raise DatasetMissing(f"no data set {name!r} in the registry; known: {sorted(entry.name for entry in CATALOG)}")


def use_of(part: Part, key: str) -> Use:
    """Which use a row belongs to: a hash of its key cuts the part by `shares`, the same way on every machine."""
    place = int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13
    edge = 0.0
    for use, share in part.shares.items():
        edge += share
        if place < edge:
            return use
    return next(reversed(part.shares))


def parts_for(use: Use) -> list[tuple[str, str]]:
    """(set, part) of every part with a share for `use`."""
    return [(dataset.name, part.name) for dataset in CATALOG for part in dataset.parts if use in part.shares]


def normalised(prompt: str) -> str:
    """Prompt as deduplication sees it: compatibility form, lower case, letters and digits with single spaces."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(re.findall(r"\w+", folded))


def deduplicate(records: Sequence[Record], *, protected: Iterable[Record] = ()) -> Deduplicated:
    """Drop records whose normalised prompt is protected or came earlier.

    Args:
        records: order is priority; the first of several equal prompts is kept.
        protected: held prompts, none of which may be left.
    """
    seen = {normalised(record.prompt): f"{record.dataset}/{record.part}" for record in protected}
    held = set(seen)
    kept: list[Record] = []
    dropped: dict[str, int] = {}
    for record in records:
        text = normalised(record.prompt)
        source = f"{record.dataset}/{record.part}"
        if text in seen:
            why = f"{source}: {'held' if text in held else 'repeats'} {seen[text]}"
            dropped[why] = dropped.get(why, 0) + 1
            continue
        seen[text] = source
        kept.append(record)
    return Deduplicated(records=tuple(kept), dropped=dict(sorted(dropped.items())))


def thinned(records: Sequence[Item], most: int) -> list[Item]:
    """At most `most` records, or whatever they are, evenly spaced."""
    if len(records) <= most:
        return list(records)
    return [records[index * len(records) // most] for index in range(most)]


def load_parts(directory: DataDirectory, parts: Iterable[tuple[str, str]], use: Use) -> list[Record]:
    """Records of several (set, part) pairs for one use, in the order given."""
    return [record for name, part in parts for record in directory.load(name, part, use)]


def held_records(directory: DataDirectory) -> list[Record]:
    """Every record that is for testing: what nothing may be trained, fitted or calibrated on."""
    return load_parts(directory, parts_for(Use.TEST), Use.TEST)


def fit_records(
    directory: DataDirectory, parts: Iterable[tuple[str, str]], use: Use = Use.FIT, *, without: Collection[str] = ()
) -> Deduplicated:
    """Records for fitting (or calibrating) without repeats and without any prompt that is held for testing.

    Calibration records repeated among the fitting records are dropped as well, so the two are disjoint.

    Args:
        without: sets that are left out of the fit, with every prompt of theirs that another set has too.
    """
    protected = held_records(directory)
    for kind in (Use.FIT, Use.CALIBRATE):
        protected += load_parts(directory, [part for part in parts_for(kind) if part[0] in without], kind)
    chosen = [part for part in parts if part[0] not in without]
    if use is Use.CALIBRATE:
        protected += load_parts(directory, list(parts_for(Use.FIT)), Use.FIT)
    return deduplicate(load_parts(directory, chosen, use), protected=protected)


def _part(dataset: DataSet, name: str) -> Part:
    for part in dataset.parts:
        if part.name == name:
            return part
    raise DatasetMissing(f"{dataset.name} has no part {name!r}; known: {[part.name for part in dataset.parts]}")


def _origin(dataset: DataSet, source: SourceFile) -> str:
    if source.address is not None:
        return f"download {source.address}"
    at = f" at commit {dataset.commit}" if dataset.commit else ""
    return (
        f"no address gives these bytes, the file was converted from https://github.com/{dataset.repository}{at}: "
        f"{source.conversion}"
    )


def _how_to_get(dataset: DataSet, source: SourceFile, path: Path, *, may_download: bool) -> str:
    advice = _origin(dataset, source)
    if not may_download and source.address is not None:
        advice += f" to that place, or leave out --data and ${DATA_VARIABLE} to have it fetched into the user's cache"
    return f"data set {dataset.name!r} lacks {source.name!r}; looked for {path}; {advice} (licence {dataset.licence})"


def _download(dataset: DataSet, source: SourceFile, path: Path) -> None:
    """Fetch to a temporary file beside the target, check the digest, then rename: never half a file."""
    import httpx

    assert source.address is not None
    try:
        answer = httpx.get(source.address, timeout=_DOWNLOAD_SECONDS, follow_redirects=True)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise DatasetMissing(
            f"data set {dataset.name!r}: cannot fetch {source.address} ({error}); put the file at {path} yourself, "
            f"or point --data or ${DATA_VARIABLE} at a directory that has {dataset.name}/{source.name}"
        ) from error
    payload = answer.content
    found = hashlib.sha256(payload).hexdigest()
    if len(payload) > _MAX_BYTES or found != source.sha256:
        raise DatasetCorrupt(
            f"{source.address} gave {len(payload)} bytes with sha256 {found}, the registry needs {source.sha256}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=source.name, suffix=".part", delete=False) as stream:
        stream.write(payload)
    Path(stream.name).replace(path)
