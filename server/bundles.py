"""Bundles that come and go while requests run: from the operator's folder into the engine, and out again.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from server.catalog import BundleView, LiveCatalog
from server.engine import Engine
from server.errors import BundleInTheWay, BundleRefused, UnknownBundle
from server.observe.metrics import Metrics
from server.readiness import check_bundle
from steering.errors import (
    BundleDigestError,
    CallerError,
    NotSupported,
    OperatorError,
    TrimtabError,
)

Check = Callable[[Path], BundleView]
"""Reads a bundle, checks every digest of it, its signature where one is asked for, and that it belongs to the model;
raises `BundleError`. Takes long, and runs in a thread."""


def unchecked(path: Path) -> BundleView:
    """Of a server that was not told how to check bundles.

    Raises:
        OperatorError: always.
    """
    raise OperatorError(f"this server cannot check {path.name}")


MANIFEST = "manifest.json"
NAME = "name"
"""Field of a request that names a folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class BundleFolder:
    """A folder of the operator's whose folders are bundles; nothing outside it can be named.

    Args:
        root: the folder; None where there is none.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root

    @property
    def names(self) -> tuple[str, ...]:
        """What could be loaded."""
        if self._root is None or not self._root.is_dir():
            return ()
        return tuple(sorted(entry.name for entry in self._root.iterdir() if self._is_bundle(entry.name)))

    def path(self, name: str) -> Path:
        """The folder of a bundle.

        Raises:
            UnknownBundle: no such one, or a name that is none: a path, or a link that leads elsewhere.
        """
        if self._root is None:
            raise UnknownBundle("this server was started without a folder of bundles: --bundle-folder", parameter=NAME)
        if not self._is_bundle(name):
            raise UnknownBundle(f"no bundle {name[:100]!r} can be loaded; there are {list(self.names)}", parameter=NAME)
        return (self._root / name).resolve()

    def _is_bundle(self, name: str) -> bool:
        assert self._root is not None
        if not _NAME.fullmatch(name):
            return False
        path = (self._root / name).resolve()
        # The files of a bundle may be links as well, as a mounted volume has them; where to is the operator's.
        return path.parent == self._root.resolve() and (path / MANIFEST).is_file()


class Bundles:
    """Loads and unloads, one at a time.

    Args:
        engine: that holds the bundles.
        catalog: offers them.
        metrics: counts what is asked.
        folder: where they come from.
        check: of what is to be loaded.
    """

    def __init__(
        self, *, engine: Engine, catalog: LiveCatalog, metrics: Metrics, folder: BundleFolder, check: Check
    ) -> None:
        self.folder = folder
        self._engine, self._catalog, self._metrics = engine, catalog, metrics
        self._check = check
        self._turn = asyncio.Lock()

    async def load(self, name: str) -> BundleView:
        """Offer one more bundle, once it is checked, every rank holds it and it steers; else all stays as it was.

        One that is loaded already is left alone.

        Raises:
            UnknownBundle: no such folder.
            BundleRefused: it is damaged or of another model, or this server cannot hold it.
            BundleInTheWay: another one of its name is loaded.
            CapacityExceeded: there is no room for it.
            EngineError: the engine does not do it, or not alike on every rank.
        """
        path = self.folder.path(name)
        async with self._counted("load"):
            view = await self._checked(path)
            loaded = next((one for one in self._catalog.now.bundles if one.name == view.name), None)
            if loaded is not None and loaded.digest == view.digest:
                return loaded
            if loaded is not None:
                raise BundleInTheWay(
                    f"bundle {loaded.label} is loaded, and names of bundles are unique; unload it before {view.label}",
                    parameter=NAME,
                )
            await self._bring_in(path, view)
            return view

    async def unload(self, wanted: str) -> BundleView:
        """Offer a bundle no more; requests taken before are steered to their end.

        Args:
            wanted: its name, label or digest.

        Raises:
            UnknownBundle: no such bundle is loaded.
            BundleInTheWay: the default one.
            EngineError: the engine does not do it; the bundle is not offered any more all the same.
        """
        async with self._counted("unload"):
            found = [one for one in self._catalog.now.bundles if wanted in (one.name, one.label, one.digest)]
            if not found:
                labels = [one.label for one in self._catalog.now.bundles]
                raise UnknownBundle(f"no bundle {wanted[:200]!r} is loaded; bundles: {labels}", parameter="bundle")
            try:
                gone = self._catalog.remove(found[0].digest)
            except NotSupported as error:
                raise BundleInTheWay(error.message, parameter="bundle") from None
            await self._engine.unload(gone.digest)
            return gone

    async def verify(self, name: str) -> BundleView:
        """Check a bundle as `load` does, and load nothing.

        Raises:
            UnknownBundle: no such folder.
            BundleRefused: it does not pass.
        """
        path = self.folder.path(name)
        async with self._counted("verify"):
            return await self._checked(path)

    async def _checked(self, path: Path) -> BundleView:
        try:
            return await asyncio.to_thread(self._check, path)
        except OperatorError as error:
            raise BundleRefused(error.message, parameter=NAME, code=error.code) from error

    async def _bring_in(self, path: Path, view: BundleView) -> None:
        try:
            digest = await self._engine.load(path)
        except OperatorError as error:
            raise BundleRefused(error.message, parameter=NAME, code=error.code) from error
        try:
            if digest != view.digest:
                raise BundleDigestError(  # noqa: TRY301 - ends like what the calls below raise
                    f"{view.label} has changed since it was checked: the engine read {digest}"
                )
            await check_bundle(self._engine, view)
            self._catalog.add(view)
        except BaseException as error:
            # Also where whoever asked has left: a bundle that nobody offers takes room for nothing.
            await asyncio.shield(self._engine.unload(digest))
            if isinstance(error, OperatorError):
                raise BundleRefused(error.message, parameter=NAME, code=error.code) from error
            raise

    @asynccontextmanager
    async def _counted(self, action: str) -> AsyncIterator[None]:
        """One at a time, and each is counted with how it ended."""
        result = "failed"
        try:
            async with self._turn:
                yield
            result = "done"
        except CallerError:
            result = "refused"
            raise
        except TrimtabError:
            raise
        finally:
            self._metrics.bundle_loads.labels(action, result).inc()
