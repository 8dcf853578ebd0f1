"""Memory: what the plugin adds to an engine, tensor by tensor. Knows nothing of vLLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from steering.engine.kernels import COUNTS, ROW_WIDTH, table_width

FLOAT, INT, LONG = 4, 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """Bytes on the device that holds the model, for ever.

    Attributes:
        bank: tables of all steered layers.
        rows: what differs per live request.
        token_rows: row of every token of a step.
        staging: on a GPU, the rows on their way and their numbers.
        pinned: on a GPU, of the host: two copies of everything that travels there, and one of the rows that come back.
    """

    bank: int
    rows: int
    token_rows: int
    staging: int = 0
    pinned: int = 0

    @property
    def device(self) -> int:
        """All of it but the host's."""
        return self.bank + self.rows + self.token_rows + self.staging

    @property
    def facts(self) -> dict[str, int]:
        """For the report."""
        return {**asdict(self), "device": self.device}


def added(*, layers: int, terms: int, width: int, requests: int, tokens: int, is_gpu: bool) -> Added:
    """Bytes of an engine's bank and rows; the tests hold them against the tensors themselves.

    Args:
        layers: that carry the op.
        terms: capacity of each layer's table.
        width: of the residual stream.
        requests, tokens: most of a step; vLLM's `max_num_seqs` and `max_num_batched_tokens`.
        is_gpu: the device is not the host.
    """
    count = 2 * requests + 1
    rows, token_rows = count * ROW_WIDTH * FLOAT, (tokens + COUNTS) * INT
    staged = rows + count * LONG
    return Added(
        bank=layers * terms * table_width(width) * FLOAT,
        rows=rows,
        token_rows=token_rows,
        staging=staged if is_gpu else 0,
        pinned=2 * (staged + token_rows) + rows if is_gpu else 0,
    )
