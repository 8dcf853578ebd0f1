"""Print those pins of a lock, hashes and all, whose distribution is not installed: `missing_pins.py locks/cuda.txt`.

For images that already hold an engine: what is there stays as it is, what is added is checked by hash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_pins(lock: str, installed: frozenset[str]) -> Iterator[str]:
    """The entries of `lock`, each of several lines, whose name is not among `installed` (canonical names)."""
    for entry in re.split(r"\n(?=\S)", lock):
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry)
        if name and canonical(name[0]) not in installed:
            yield entry.rstrip()


def main() -> None:
    """Read the lock named on the command line and print what is missing here."""
    lock = Path(sys.argv[1]).read_text(encoding="utf-8")
    installed = frozenset(canonical(found.metadata["Name"]) for found in distributions())
    sys.stdout.writelines(f"{entry}\n" for entry in missing_pins(lock, installed))


if __name__ == "__main__":
    main()
