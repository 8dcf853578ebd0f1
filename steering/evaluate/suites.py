"""Suites: named lists of held prompts, and whether refusing them is right.

Knows nothing of models or servers.
"""

from __future__ import annotations

from dataclasses import dataclass

from steering.errors import DatasetMissing
from steering.fit.datasets import DataDirectory
from steering.fit.sources import Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Prompts of one part of one set, all of them for testing only.

    Attributes:
        name: as the command line takes it.
        dataset, part: in the registry of data sets.
        is_harmful: refusing is right.
    """

    name: str
    dataset: str
    part: str
    is_harmful: bool

    def prompts(self, directory: DataDirectory, most: int | None = None) -> list[str]:
        """The prompts, evenly spaced ones where there are more than `most`; the same ones every time.

        Raises:
            DatasetError: the set is not there or not what the registry says.
        """
        found = [record.prompt for record in directory.load(self.dataset, self.part, Use.TEST)]
        if most is None or len(found) <= most:
            return found
        return [found[index * len(found) // most] for index in range(most)]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(name="xstest-safe", dataset="xstest", part="safe", is_harmful=False),
        Suite(name="xstest-unsafe", dataset="xstest", part="unsafe", is_harmful=True),
        Suite(name="coconot-contrast", dataset="coconot", part="contrast", is_harmful=False),
        Suite(name="jbb-benign", dataset="jailbreakbench", part="benign", is_harmful=False),
        Suite(name="jbb-harmful", dataset="jailbreakbench", part="harmful", is_harmful=True),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        DatasetMissing: no such suite; lists those there are.
    """
    if name not in SUITES:
        raise DatasetMissing(f"no suite {name!r}; suites: {sorted(SUITES)}")
    return SUITES[name]
