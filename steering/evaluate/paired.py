"""Two arms on the same prompts: the difference of their rates with an interval that knows the pairing.

Newcombe's method 10 (Statistics in Medicine 17, 1998, p. 2635) for the interval, McNemar's exact test for the p-value.
Knows nothing of what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steering.fit.intervals import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Counts of prompts by what happened under a first and a second arm.

    Attributes:
        both, only_first, only_second, neither: in how many prompts the counted thing happened under which.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[bool, bool]]) -> Paired:
        """Counted from (first, second) for each prompt."""
        return cls(
            both=sum(first and second for first, second in pairs),
            only_first=sum(first and not second for first, second in pairs),
            only_second=sum(second and not first for first, second in pairs),
            neither=sum(not first and not second for first, second in pairs),
        )

    @property
    def n(self) -> int:
        """Prompts."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def first(self) -> Rate:
        """Rate under the first arm."""
        return Rate(count=self.both + self.only_first, n=self.n)

    @property
    def second(self) -> Rate:
        """Rate under the second arm."""
        return Rate(count=self.both + self.only_second, n=self.n)

    @property
    def difference(self) -> float:
        """First minus second; nan without prompts."""
        return self.first.value - self.second.value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference; (-1, 1) without prompts."""
        if not self.n:
            return -1.0, 1.0
        p1, p2 = self.first.value, self.second.value
        (low1, high1), (low2, high2) = self.first.interval, self.second.interval
        phi = self._phi()

        def half(down: float, up: float) -> float:
            return math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))

        return (
            max(-1.0, p1 - p2 - half(p1 - low1, high2 - p2)),
            min(1.0, p1 - p2 + half(high1 - p1, p2 - low2)),
        )

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided: that the prompts which differ fall on either side by a fair coin."""
        total, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if not total:
            return 1.0
        # Through logarithms, since 2**total has no float beyond 1,023 prompts.
        tail = sum(
            math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2.0))
            for k in range(least + 1)
        )
        return min(1.0, 2.0 * tail)

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        low, high = self.interval
        first, second = self.first, self.second
        return {
            "n": self.n,
            "first": first.to_json(),
            "second": second.to_json(),
            "difference": round(self.difference, 4) if self.n else None,
            "low": round(low, 4),
            "high": round(high, 4),
            "p": float(f"{self.p_value:.3g}"),
            "intervals_touch": first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1],
        }

    def _phi(self) -> float:
        """Correlation of the two, continuity-corrected downwards; 0 where a row or column is empty."""
        a, b, c, d = self.both, self.only_first, self.only_second, self.neither
        product = (a + b) * (c + d) * (a + c) * (b + d)
        if not product:
            return 0.0
        cross = float(a * d - b * c)
        return (max(cross - self.n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
