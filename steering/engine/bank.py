"""Bank: the terms of every loaded edit and the probes of every gate, in one fixed table per steered layer.

Written when a bundle is loaded or unloaded, read by the steering op. Knows nothing of requests: whoever unloads a
bundle knows that none names it any more (`loads.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steering.bundle import Bundle
from steering.engine.kernels import (
    BIAS,
    COMPLY_EDIT,
    FIRST,
    GAIN,
    GATE_FIRST,
    REFUSE_EDIT,
    table_width,
)
from steering.engine.spans import Span, Spans
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


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    """What a loaded bundle has in the bank: numbers of its edits by name, gates by profile, and rows."""

    edits: dict[str, int] = field(default_factory=dict)
    gates: dict[str, BankedGate] = field(default_factory=dict)
    response: BankedResponse | None = None
    reasoning_end: int | None = None
    spans: list[Span] = field(default_factory=list)


class Bank:
    """Tables of shape [N, 2D + 8] float32, one per steered layer, laid out as `kernels` says.

    An edit has the same number at every layer; its terms take consecutive rows, which differ from layer to layer. So
    do the scores of a gate, at its probe's layer. Nothing outside the tables names a row of terms, so they can be
    packed while requests run.

    Args:
        layers: decoder blocks that get a table.
        width: residual width, D.
        terms: capacity N of each table; also one more than the number of edits it can name.
        device: where the tables live, for ever at the same address.
        dtype: of the model's residual stream; what an edit adds must be a number in it.

    Attributes:
        changes: how often something was loaded or unloaded, after which a number may mean something else.
    """

    def __init__(
        self,
        *,
        layers: Iterable[int],
        width: int,
        terms: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.width = width
        self.terms = terms
        self.tables: dict[int, Tensor] = {
            layer: torch.zeros(terms, table_width(width), dtype=torch.float32, device=device) for layer in layers
        }
        self.changes = 0
        self._dtype = dtype
        self._held: dict[str, _Held] = {}
        self._names: dict[int, str] = {}
        self._spans = {layer: Spans(layer, table) for layer, table in self.tables.items()}

    @property
    def bundles(self) -> dict[str, list[str]]:
        """Names of the loaded edits by bundle digest."""
        return {digest: list(held.edits) for digest, held in self._held.items()}

    @property
    def gates(self) -> dict[str, list[str]]:
        """Names of the profiles with a gate by bundle digest; every loaded bundle has an entry."""
        return {digest: list(held.gates) for digest, held in self._held.items()}

    @property
    def is_sparing(self) -> bool:
        """Whether a loaded bundle has a profile that spares reasoning."""
        return any(held.reasoning_end is not None for held in self._held.values())

    @property
    def responses(self) -> dict[str, int]:
        """Tokens that the response probe reads, by digest of the bundles that have one."""
        return {digest: held.response.tokens for digest, held in self._held.items() if held.response is not None}

    @property
    def taken(self) -> dict[int, int]:
        """Rows that terms and scores take, by layer."""
        return {layer: spans.taken for layer, spans in self._spans.items()}

    def load(self, bundle: Bundle) -> None:
        """Put every edit, gate and response probe of a bundle into the tables; a loaded bundle is left alone.

        Raises:
            BundleFormatError, CapacityExceeded: as `check`. Whatever is raised, nothing of the bundle is loaded then.
        """
        if bundle.digest in self._held:
            return
        self.check(bundle)
        self.changes += 1
        held = self._held[bundle.digest] = _Held()
        try:
            self._fill(bundle, held)
        except BaseException:  # a device may have no memory left even for the way there
            self.unload(bundle.digest)
            raise

    def unload(self, digest: str) -> None:
        """Clear every row and number of a bundle, for others to take; one that is not loaded is no error.

        No row of a live request may name an edit or gate of it.
        """
        held = self._held.pop(digest, None)
        if held is None:
            return
        self.changes += 1
        for span in held.spans:
            self._spans[span.layer].give(span)
        for number in held.edits.values():
            del self._names[number]

    def _fill(self, bundle: Bundle, held: _Held) -> None:
        for name, edit in bundle.edits.items():
            number = _lowest_free(self._names)
            held.edits[name] = number
            self._names[number] = name
            for terms in edit.layers:
                table, span = self._take(held, terms.layer, terms.rank, number, FIRST)
                scalars = 2 * self.width
                # A direction that is not read need not have norm 1; it stays out.
                is_read = (terms.gain != 0).unsqueeze(1)
                table[span, : self.width] = torch.where(is_read, terms.read, 0.0).to(table.device)
                table[span, self.width : scalars] = terms.write.to(table.device)
                table[span, scalars + GAIN] = terms.gain.to(table.device)
                table[span, scalars + BIAS] = terms.bias.to(table.device)
        for profile, probe in _gated(bundle):
            self._load_gate(held, profile, probe)
        record = bundle.manifest.response
        if record is not None and record.tokens is not None:
            number, _, _ = self._load_scores(held, bundle.probes[record.name])
            held.response = BankedResponse(number=number, tokens=record.tokens)
        if bundle.manifest.is_sparing and bundle.manifest.reasoning_end is not None:
            held.reasoning_end = bundle.manifest.reasoning_end.token_id

    def _load_gate(self, held: _Held, profile: Profile, probe: Probe) -> None:
        (number, table, span), scalars = self._load_scores(held, probe), 2 * self.width
        for row, category in enumerate(probe.categories, start=span.start + 1):
            for column, chosen in ((REFUSE_EDIT, profile.refuse), (COMPLY_EDIT, profile.comply)):
                if category in chosen:
                    table[row, scalars + column] = float(held.edits[chosen[category]])
        held.gates[profile.name] = BankedGate(number=number, categories=probe.categories)

    def _load_scores(self, held: _Held, probe: Probe) -> tuple[int, Tensor, slice]:
        """Put a probe's scores into its layer's table; its number, that table, and the rows they take there."""
        number = _lowest_free({number for spans in self._spans.values() for number in spans.gates})
        table, span = self._take(held, probe.layer, len(probe.bias), number, GATE_FIRST)
        table[span, : self.width] = probe.weight.to(table.device)
        table[span, 2 * self.width + BIAS] = probe.bias.to(table.device)
        return number, table, span

    def _take(self, held: _Held, layer: int, count: int, number: int, head: int) -> tuple[Tensor, slice]:
        span = self._spans[layer].take(count, number=number, head=head)
        held.spans.append(span)
        return self.tables[layer], span.rows

    def check(self, bundle: Bundle) -> None:
        """Whether `load` would take a bundle; changes nothing. `load_bundle` has checked its numbers by themselves.

        Raises:
            BundleFormatError: an edit or probe has another width or a layer without a table, or what an edit adds at
                its highest certified strength is no number in the model's dtype.
            CapacityExceeded: a table has no room.
        """
        for kind, loaded in (("edit", bundle.edits), ("probe", bundle.probes)):
            for name, item in loaded.items():
                if item.width != self.width:
                    raise BundleFormatError(f"{kind} {name!r} has width {item.width}, the model has {self.width}")
        needed = self.taken
        for layer, rank in _rows_of(bundle):
            if layer not in needed:
                raise BundleFormatError(
                    f"bundle {bundle.label} needs layer {layer}; layers that carry the op: {sorted(self.tables)}; "
                    "name more of them when the engine starts (--steer-layers)"
                )
            needed[layer] += rank
        self._check_doses(bundle)
        edits = len(self._names) + len(bundle.edits)
        gates = sum(len(held.gates) + (held.response is not None) for held in self._held.values()) + _readers(bundle)
        if max([*needed.values(), edits + 1, gates + 1]) > self.terms:
            raise CapacityExceeded(
                f"bundle {bundle.label} needs {max(needed.values())} terms in one layer, {edits} edits and "
                f"{gates} gates and response probes in all; the bank holds {self.terms} terms, {self.terms - 1} "
                "edits and as many gates; unload a bundle, or start with a higher terms_per_layer"
            )

    def _check_doses(self, bundle: Bundle) -> None:
        largest = torch.finfo(self._dtype).max
        for record in bundle.manifest.edits:
            strength = max(abs(record.strength.minimum), abs(record.strength.maximum))
            for terms in bundle.edits[record.name].layers:
                added = strength * math.fsum(terms.bias.abs().tolist())
                if added > largest:
                    raise BundleFormatError(
                        f"edit {record.name!r} layer {terms.layer}: bias adds up to {added:.6g} at the highest "
                        f"certified strength {strength:g}; the model's {self._dtype} ends at {largest:.6g}"
                    )

    def gate(self, *, bundle: str, profile: str) -> BankedGate:
        """The gate of a profile.

        Raises:
            UnknownName: no such bundle is loaded, or the profile has no gate.
        """
        try:
            return self._held[bundle].gates[profile]
        except KeyError:
            raise UnknownName(f"no gate {profile!r} of bundle {bundle} in the bank; loaded: {self.gates}") from None

    def reasoning_end(self, *, bundle: str) -> int:
        """Id of the token at which reasoning ends.

        Raises:
            UnknownName: no such bundle is loaded, or none of its profiles spares reasoning.
        """
        held = self._held.get(bundle)
        if held is None or held.reasoning_end is None:
            sparing = sorted(digest for digest, held in self._held.items() if held.reasoning_end is not None)
            raise UnknownName(f"no profile of bundle {bundle} spares reasoning; bundles that do: {sparing}")
        return held.reasoning_end

    def response(self, *, bundle: str) -> BankedResponse:
        """The response probe of a bundle.

        Raises:
            UnknownName: no such bundle is loaded, or it has none.
        """
        held = self._held.get(bundle)
        if held is None or held.response is None:
            raise UnknownName(f"no response probe of bundle {bundle} in the bank; loaded: {self.responses}")
        return held.response

    def name(self, number: int) -> str | None:
        """Name of the loaded edit with this number; None for 0."""
        return self._names.get(number)

    def number(self, *, bundle: str, edit: str) -> int:
        """Number of a loaded edit, 1 or more.

        Raises:
            UnknownName: no such bundle or edit is loaded.
        """
        try:
            return self._held[bundle].edits[edit]
        except KeyError:
            raise UnknownName(f"no edit {edit!r} of bundle {bundle} in the bank; loaded: {self.bundles}") from None

    def witness(self) -> list[int]:
        """Layers whose op has edited a token since the last `clear_witness`; waits for the device."""
        return [layer for layer, table in self.tables.items() if table[0, 2 * self.width + FIRST].item() != 0.0]

    def clear_witness(self) -> None:
        """Forget which layers' ops have run."""
        for table in self.tables.values():
            table[0, 2 * self.width + FIRST] = 0.0


def _lowest_free(taken: Container[int]) -> int:
    """The lowest number, 1 or more, that is not taken."""
    return next(number for number in itertools.count(1) if number not in taken)


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
