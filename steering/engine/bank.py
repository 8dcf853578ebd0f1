"""Bank: the terms of every loaded edit, in one fixed table per steered layer.

Written when a bundle is loaded, read by the steering op. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from steering.bundle import Bundle
from steering.engine.kernels import BIAS, COUNT, FIRST, GAIN, table_width
from steering.errors import BundleFormatError, CapacityExceeded, UnknownName


class Bank:
    """Tables of shape [N, 2D + 4] float32, one per steered layer, laid out as `kernels` says.

    An edit has the same number at every layer; its terms take consecutive rows, which differ from layer to layer.

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
        self._layers_of: dict[int, tuple[int, ...]] = {}

    @property
    def bundles(self) -> dict[str, list[str]]:
        """Names of the loaded edits by bundle digest."""
        names: dict[str, list[str]] = {}
        for digest, edit in self._numbers:
            names.setdefault(digest, []).append(edit)
        return names

    def load(self, bundle: Bundle) -> None:
        """Put every edit of a bundle into the tables; a bundle that is loaded already is left alone.

        Raises:
            BundleFormatError: an edit has another width or a layer without a table.
            CapacityExceeded: a table has no room; nothing of the bundle is loaded then.
        """
        if bundle.digest in self.bundles:
            return
        needed = dict.fromkeys(self.tables, 0)
        for name, edit in bundle.edits.items():
            if edit.width != self.width:
                raise BundleFormatError(f"edit {name!r} has width {edit.width}, the model has {self.width}")
            for terms in edit.layers:
                if terms.layer not in self.tables:
                    raise BundleFormatError(f"edit {name!r} needs layer {terms.layer}; steered: {sorted(self.tables)}")
                needed[terms.layer] += terms.rank
        edits_after = len(self._numbers) + len(bundle.edits)
        fullest = max(self._used[layer] + needed[layer] for layer in self.tables)
        if fullest > self.terms or edits_after >= self.terms:
            raise CapacityExceeded(
                f"bundle {bundle.label} needs {fullest} terms in one layer and {edits_after} edits in all, "
                f"the bank holds {self.terms} and {self.terms - 1}; raise terms_per_layer"
            )
        for name, edit in bundle.edits.items():
            number = len(self._numbers) + 1
            for terms in edit.layers:
                table, first = self.tables[terms.layer], self._used[terms.layer]
                span = slice(first, first + terms.rank)
                scalars = 2 * self.width
                table[span, : self.width] = terms.read.to(table.device)
                table[span, self.width : scalars] = terms.write.to(table.device)
                table[span, scalars + GAIN] = terms.gain.to(table.device)
                table[span, scalars + BIAS] = terms.bias.to(table.device)
                table[number, scalars + FIRST] = float(first)
                table[number, scalars + COUNT] = float(terms.rank)
                self._used[terms.layer] += terms.rank
            self._numbers[bundle.digest, name] = number
            self._layers_of[number] = tuple(terms.layer for terms in edit.layers)

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
