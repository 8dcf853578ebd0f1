"""Loads: bundles that come into the bank of a worker, and leave it, while requests run.

A bundle in the bank is out of reach until the scheduler lets requests name it (`roster.py`). So every rank of an engine
fills its tables first, then they vote, and where one could not do it all of them clear what they filled: what is served
never differs from rank to rank. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from steering.bundle import Bundle, load_bundle
from steering.engine.bank import Bank
from steering.engine.rows import Rows
from steering.errors import BundleDigestError, EngineError, InvalidSpec, UnsupportedConfiguration


class Loads:
    """What is loaded and unloaded in one worker.

    Args:
        bank: of this worker.
        rows: of this worker; says which bundles live requests name.
        vote: gives whether every rank of the engine has voted True; called by all of them, once per load.
        settle: waits until what earlier steps left to be told has been told, which reads names in the bank.
        can_spare: the model was built to keep edits off reasoning. The op that does it is part of its graphs.
    """

    def __init__(
        self, *, bank: Bank, rows: Rows, vote: Callable[[bool], bool], settle: Callable[[], None], can_spare: bool
    ) -> None:
        self._bank, self._rows, self._vote, self._settle = bank, rows, vote, settle
        self._can_spare = can_spare
        self._released: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        """Whether a released bundle is still in the bank."""
        return bool(self._released)

    def load(self, path: Path, digest: str) -> None:
        """Put a bundle into the bank of every rank, or of none; one that is there is left alone.

        Raises:
            BundleError: the folder holds no valid bundle, or another one, or one this engine cannot hold.
            CapacityExceeded: there is no room.
            UnsupportedConfiguration: it spares reasoning, and this engine was not built to.
            EngineError: another rank could not load it; that one raises what kept it from it.
        """
        is_new, failure = digest not in self._bank.bundles, None
        try:
            if is_new:
                self._bank.load(self._checked(path, digest))
        except Exception as error:  # noqa: BLE001 - the others wait for this rank's vote, whatever happened
            failure = error
        is_agreed = self._vote(failure is None)
        if is_agreed:
            self._released.discard(digest)
            return
        if is_new:
            self._bank.unload(digest)
        raise failure or EngineError(f"another rank could not load bundle {digest}; it is loaded on none")

    def unload(self, digest: str) -> None:
        """Take a bundle out of the bank at once; one that is not there is no error.

        Raises:
            InvalidSpec: a live request names it.
        """
        if self._rows.names(digest):
            raise InvalidSpec(f"bundle {digest} is named by a live request; close it and let its requests end")
        self._settle()
        self._bank.unload(digest)
        self._released.discard(digest)

    def release(self, digests: Iterable[str]) -> None:
        """Take bundles out of the bank that the scheduler accepts no request for any more and that it knows of none
        for; one that a row still names, as this worker has not heard of its end yet, at the next call after that.
        """
        self._released.update(digests)
        for digest in sorted(self._released):
            if not self._rows.names(digest):
                self.unload(digest)

    def _checked(self, path: Path, digest: str) -> Bundle:
        bundle = load_bundle(path)
        if bundle.digest != digest:
            raise BundleDigestError(f"bundle {path} has digest {bundle.digest}, {digest} was to be loaded")
        if bundle.manifest.is_sparing and not self._can_spare:
            raise UnsupportedConfiguration(
                f"bundle {bundle.label} spares reasoning, and no bundle this engine was started with does: its graphs "
                "lack what finds the end of reasoning; start the engine with it"
            )
        return bundle
