"""Proportions with 95 % Wilson intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """`count` of `n`; the interval is Wilson's, which stays inside 0…1 also near its ends."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """The proportion; nan for an empty sample."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval; (0, 1) for an empty sample."""
        if not self.n:
            return 0.0, 1.0
        share, z2 = self.value, Z95 * Z95
        centre = (share + z2 / (2 * self.n)) / (1 + z2 / self.n)
        half = Z95 * math.sqrt(share * (1 - share) / self.n + z2 / (4 * self.n**2)) / (1 + z2 / self.n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_json(self) -> dict[str, float | int]:
        """Rounded to four places, for reports."""
        low, high = self.interval
        value = round(self.value, 4) if self.n else 0.0
        return {"rate": value, "low": round(low, 4), "high": round(high, 4), "count": self.count, "n": self.n}
