"""Bank: the terms of every loaded edit and the probes of every gate, in one fixed table per steered layer.

Written when a bundle is loaded, read by the steering op. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.bundle import Bundle
from steering.engine.kernels import (
    BIAS,
    COMPLY_EDIT,
    COUNT,
    FIRST,
    GAIN,
    GATE_COUNT,
    GATE_FIRST,
    REFUSE_EDIT,
    table_width,
)
from steering.errors import BundleFormatError, CapacityExceeded, UnknownName
from steering.gate import Probe
from steering.manifest import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class BankedGate:
    """A gate in the bank.

    Attributes:
        number: 1 or more.
        categories: of its probe, in the order of their bits.
    """

    number: int
    categories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankedResponse:
    """A response probe in the bank: its number, 1 or more and none of a gate, and how many tokens it reads at most."""

    number: int
    tokens: int


def terms_needed(bundles: Iterable[Bundle]) -> int:
    """Rows that a layer's table must have for all of these bundles: terms and probes of the fullest layer, and the
    numbers of edits and gates, each with the number 0 on top.
    """
    used: dict[int, int] = {}
    edits = gates = 0
    for bundle in bundles:
        edits, gates = edits + len(bundle.edits), gates + _readers(bundle)
        for layer, rank in _rows_of(bundle):
            used[layer] = used.get(layer, 0) + rank
    return max([edits + 1, gates + 1, *used.values()])


class Bank:
    """Tables of shape [N, 2D + 8] float32, one per steered layer, laid out as `kernels` says.

    An edit has the same number at every layer; its terms take consecutive rows, which differ from layer to layer. So
    do the scores of a gate, at its probe's layer.

    Args:
        layers: decoder blocks that get a table.
        width: residual width, D.
        terms: capacity N of each table; also one more than the number of edits it can name.
        device: where the tables live, for ever at the same address.
    """

    def __init__(self, *, layers: Iterable[int], width: int, terms: int, device: torch.device) -> None:
        self.width = width
        self.terms = terms
        self.tables: dict[int, Tensor] = {
            layer: torch.zeros(terms, table_width(width), dtype=torch.float32, device=device) for layer in layers
        }
        self._used: dict[int, int] = dict.fromkeys(self.tables, 0)
        self._numbers: dict[tuple[str, str], int] = {}
        self._names: list[str | None] = [None]
        self._gates: dict[tuple[str, str], BankedGate] = {}
        self._responses: dict[str, BankedResponse] = {}
        self._reasoning_ends: dict[str, int] = {}

    @property
    def bundles(self) -> dict[str, list[str]]:
        """Names of the loaded edits by bundle digest."""
        return _by_digest(self._numbers)

    @property
    def gates(self) -> dict[str, list[str]]:
        """Names of the profiles with a gate by bundle digest; every loaded bundle has an entry."""
        return {digest: [] for digest in self.bundles} | _by_digest(self._gates)

    @property
    def is_sparing(self) -> bool:
        """Whether a loaded bundle has a profile that spares reasoning."""
        return bool(self._reasoning_ends)

    @property
    def responses(self) -> dict[str, int]:
        """Tokens that the response probe reads, by digest of the bundles that have one."""
        return {digest: response.tokens for digest, response in self._responses.items()}

    def load(self, bundle: Bundle) -> None:
        """Put every edit, gate and response probe of a bundle into the tables; a loaded bundle is left alone.

        Raises:
            BundleFormatError: an edit or probe has another width or a layer without a table.
            CapacityExceeded: a table has no room; nothing of the bundle is loaded then.
        """
        if bundle.digest in self.bundles:
            return
        self._check_room(bundle)
        for name, edit in bundle.edits.items():
            number = len(self._names)
            for terms in edit.layers:
                table, span = self._take(terms.layer, terms.rank)
                scalars = 2 * self.width
                table[span, : self.width] = terms.read.to(table.device)
                table[span, self.width : scalars] = terms.write.to(table.device)
                table[span, scalars + GAIN] = terms.gain.to(table.device)
                table[span, scalars + BIAS] = terms.bias.to(table.device)
                table[number, scalars + FIRST] = float(span.start)
                table[number, scalars + COUNT] = float(terms.rank)
            self._numbers[bundle.digest, name] = number
            self._names.append(name)
        for profile, probe in _gated(bundle):
            self._load_gate(bundle.digest, profile, probe)
        record = bundle.manifest.response
        if record is not None and record.tokens is not None:
            number, _, _ = self._load_scores(bundle.probes[record.name])
            self._responses[bundle.digest] = BankedResponse(number=number, tokens=record.tokens)
        if bundle.manifest.is_sparing and bundle.manifest.reasoning_end is not None:
            self._reasoning_ends[bundle.digest] = bundle.manifest.reasoning_end.token_id

    def _load_gate(self, digest: str, profile: Profile, probe: Probe) -> None:
        (number, table, span), scalars = self._load_scores(probe), 2 * self.width
        for row, category in enumerate(probe.categories, start=span.start + 1):
            for column, chosen in ((REFUSE_EDIT, profile.refuse), (COMPLY_EDIT, profile.comply)):
                if category in chosen:
                    table[row, scalars + column] = float(self._numbers[digest, chosen[category]])
        self._gates[digest, profile.name] = BankedGate(number=number, categories=probe.categories)

    def _load_scores(self, probe: Probe) -> tuple[int, Tensor, slice]:
        """Put a probe's scores into its layer's table; its number, that table, and the rows they take there."""
        number, scalars = len(self._gates) + len(self._responses) + 1, 2 * self.width
        table, span = self._take(probe.layer, len(probe.bias))
        table[span, : self.width] = probe.weight.to(table.device)
        table[span, scalars + BIAS] = probe.bias.to(table.device)
        table[number, scalars + GATE_FIRST] = float(span.start)
        table[number, scalars + GATE_COUNT] = float(len(probe.bias))
        table[0, scalars + GATE_COUNT] += 1.0
        return number, table, span

    def _take(self, layer: int, rank: int) -> tuple[Tensor, slice]:
        first = self._used[layer]
        self._used[layer] += rank
        return self.tables[layer], slice(first, first + rank)

    def _check_room(self, bundle: Bundle) -> None:
        for kind, loaded in (("edit", bundle.edits), ("probe", bundle.probes)):
            for name, item in loaded.items():
                if item.width != self.width:
                    raise BundleFormatError(f"{kind} {name!r} has width {item.width}, the model has {self.width}")
        needed = dict(self._used)
        for layer, rank in _rows_of(bundle):
            if layer not in needed:
                raise BundleFormatError(f"bundle {bundle.label} needs layer {layer}; steered: {sorted(self.tables)}")
            needed[layer] += rank
        edits = len(self._names) + len(bundle.edits)
        gates = len(self._gates) + len(self._responses) + 1 + _readers(bundle)
        most = max(*needed.values(), edits, gates)
        if most > self.terms:
            raise CapacityExceeded(
                f"bundle {bundle.label} needs {max(needed.values())} terms in one layer, {edits - 1} edits and "
                f"{gates - 1} gates and response probes in all; the bank holds {self.terms} terms, {self.terms - 1} "
                "edits and as many gates; raise terms_per_layer"
            )

    def gate(self, *, bundle: str, profile: str) -> BankedGate:
        """The gate of a profile.

        Raises:
            UnknownName: no such bundle is loaded, or the profile has no gate.
        """
        try:
            return self._gates[bundle, profile]
        except KeyError:
            raise UnknownName(f"no gate {profile!r} of bundle {bundle} in the bank; loaded: {self.gates}") from None

    def reasoning_end(self, *, bundle: str) -> int:
        """Id of the token at which reasoning ends.

        Raises:
            UnknownName: no such bundle is loaded, or none of its profiles spares reasoning.
        """
        try:
            return self._reasoning_ends[bundle]
        except KeyError:
            raise UnknownName(
                f"no profile of bundle {bundle} spares reasoning; bundles that do: {sorted(self._reasoning_ends)}"
            ) from None

    def response(self, *, bundle: str) -> BankedResponse:
        """The response probe of a bundle.

        Raises:
            UnknownName: no such bundle is loaded, or it has none.
        """
        try:
            return self._responses[bundle]
        except KeyError:
            raise UnknownName(f"no response probe of bundle {bundle} in the bank; loaded: {self.responses}") from None

    def name(self, number: int) -> str | None:
        """Name of the edit with this number; None for 0."""
        return self._names[number]

    def number(self, *, bundle: str, edit: str) -> int:
        """Number of a loaded edit, 1 or more.

        Raises:
            UnknownName: no such bundle or edit is loaded.
        """
        try:
            return self._numbers[bundle, edit]
        except KeyError:
            raise UnknownName(f"no edit {edit!r} of bundle {bundle} in the bank; loaded: {self.bundles}") from None

    def witness(self) -> list[int]:
        """Layers whose op has edited a token since the last `clear_witness`; waits for the device."""
        return [layer for layer, table in self.tables.items() if table[0, 2 * self.width + FIRST].item() != 0.0]

    def clear_witness(self) -> None:
        """Forget which layers' ops have run."""
        for table in self.tables.values():
            table[0, 2 * self.width + FIRST] = 0.0


def _by_digest(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for digest, name in names:
        found.setdefault(digest, []).append(name)
    return found


def _gated(bundle: Bundle) -> list[tuple[Profile, Probe]]:
    return [(profile, bundle.probes[profile.gate.probe]) for profile in bundle.manifest.profiles if profile.gate]


def _readers(bundle: Bundle) -> int:
    """How many numbers its gates and its response probe take."""
    return len(_gated(bundle)) + (bundle.manifest.response is not None)


def _rows_of(bundle: Bundle) -> list[tuple[int, int]]:
    """(layer, rows it needs there) of every edit, gate and response probe."""
    edits = [(terms.layer, terms.rank) for edit in bundle.edits.values() for terms in edit.layers]
    probes = [probe for _, probe in _gated(bundle)]
    if bundle.manifest.response is not None:
        probes.append(bundle.probes[bundle.manifest.response.name])
    return edits + [(probe.layer, len(probe.bias)) for probe in probes]
