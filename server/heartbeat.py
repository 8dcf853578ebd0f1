"""Heartbeat: proof that tokens still come out, steered and not, while no request shows it.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import logging

from server.catalog import LiveCatalog
from server.engine import Engine
from server.observe.events import Ended
from server.readiness import covering_edits, one_token, plan_of_edit
from steering.errors import CapacityExceeded, EngineError, EngineOverloaded, EngineTimeout, TrimtabError

RETRY = 5.0
"""Seconds between beats after one that failed, where the interval is longer."""

OWN_TOKENS = 2
"""Most that a beat itself is given."""

_log = logging.getLogger("trimtab")


class Heartbeat:
    """Sends the engine requests of its own; observes those of others, which spare it some.

    An engine can be alive and still give no token, as on some faults of a GPU. One that gives tokens to others is no
    such engine, however long a beat has to wait behind them.

    Args:
        engine: under proof.
        catalog: of whose default bundle an edit is tried.
        interval: seconds between two beats; 0 for none.
        timeout: seconds for one.
        failures: in a row, after which the engine is lost.

    Attributes:
        failure: what the last beat failed with; None while tokens come.
    """

    def __init__(self, engine: Engine, catalog: LiveCatalog, *, interval: float, timeout: float, failures: int) -> None:
        self.failure: TrimtabError | None = None
        self._engine, self._catalog = engine, catalog
        self._interval, self._timeout, self._allowed = interval, timeout, failures
        self._failed = 0
        self._proofs = 0

    @property
    def is_lost(self) -> bool:
        """Whether so many beats have failed that only a restart can help."""
        return self._failed >= self._allowed

    def ended(self, event: Ended) -> None:
        """A request has ended; one that was edited, or read by a gate, is as good as a beat."""
        if event.is_complete and any(effect.applied or effect.scores is not None for effect in event.effects.values()):
            self._proofs += 1
            self._passed()

    async def run(self) -> None:
        """Beat until cancelled."""
        if not self._interval:
            return
        while True:
            proofs = self._proofs
            await asyncio.sleep(self._interval if self.failure is None else min(self._interval, RETRY))
            if self._proofs == proofs and self._engine.is_alive:
                await self.beat()

    async def beat(self) -> None:
        """Ask for one token unsteered, and for one under an edit of the default bundle."""
        before = self._engine.generated
        try:
            async with asyncio.timeout(self._timeout):
                await self._try()
        except (CapacityExceeded, EngineOverloaded):
            return  # busy with others
        except TimeoutError:
            if self._engine.generated - before <= OWN_TOKENS:  # else others are served, and this waits behind them
                self._missed(EngineTimeout(f"the engine gave no token within {self._timeout:g} s"))
        except TrimtabError as error:
            self._missed(error)
        except Exception as error:  # noqa: BLE001 - a beat is finished off here: whatever broke, no token came
            _log.exception("a heartbeat broke")
            self._missed(EngineError(f"a heartbeat broke: {type(error).__name__}"))
        else:
            self._passed()

    async def _try(self) -> None:
        await one_token(self._engine, None)
        bundle = self._catalog.now.bundles[0]
        edits = covering_edits(bundle.edits)
        if edits:
            await one_token(self._engine, plan_of_edit(bundle, edits[0]))

    def _passed(self) -> None:
        if self.failure is not None:
            _log.warning("the engine gives tokens again")
        self.failure, self._failed = None, 0

    def _missed(self, error: TrimtabError) -> None:
        self._failed += 1
        _log.error("heartbeat failed, %d in a row: %s: %s", self._failed, error.code, error.message)
        self.failure = error
