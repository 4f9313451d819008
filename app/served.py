"""The version being served, and its replacement by another one without losing a request."""

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio import to_thread

from app.batcher import MicroBatcher
from app.engines.base import Engine
from app.memory import give_back
from app.model.manifest import Manifest
from app.model.metadata import Fusion
from app.model.out_of_distribution import Familiar

LOG = logging.getLogger(__name__)


class VersionRefused(Exception):
    """A version that cannot be served here; the message says why."""


class VersionMissing(Exception):
    """There is no such version."""


class ReportMissing(Exception):
    """The report of a version has no such file."""


@dataclass(eq=False)
class Running:
    """One version, loaded and warm."""

    engine: Engine
    manifest: Manifest
    batcher: MicroBatcher
    familiar: Familiar | None = None  # what an image's score is computed from, where the version has it
    fusion: Fusion | None = None  # what adds metadata to an image's logits, where the version has it
    users: int = 0  # requests that were begun with it
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Served:
    """Holds the running version; a request keeps the one that it began with to its end.

    Args:
        version: what to serve first.
        start: loads and warms a version; seconds of work, done in a thread once the server runs.
        on_change: told of each version that is served from now on.
    """

    def __init__(
        self, version: str, start: Callable[[str], Running], *, on_change: Callable[[Running], None] = lambda _: None
    ) -> None:
        self._start = start
        self._on_change = on_change
        self._one_at_a_time = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._alive: tuple[weakref.ref[MicroBatcher], ...] = ()
        self._serve(start(version))

    def _serve(self, running: Running) -> None:
        self.now = running
        self._alive = (*(ref for ref in self._alive if ref()), weakref.ref(running.batcher))
        self._on_change(running)

    @property
    def batchers(self) -> list[MicroBatcher]:
        """Of the version being served, and of those that still finish what they began; from any thread."""
        return [batcher for ref in self._alive if (batcher := ref())]

    def open(self) -> None:
        """Take work; call from the event loop."""
        self.now.batcher.start()

    async def close(self) -> None:
        """Finish what was accepted, by whichever version."""
        await self.now.batcher.stop()
        if self._retiring:
            await asyncio.wait(self._retiring)

    @contextmanager
    def use(self) -> Iterator[Running]:
        """The version that this request is answered by."""
        running = self.now
        running.users += 1
        try:
            yield running
        finally:
            running.users -= 1
            if not running.users:
                running.unused.set()

    async def replace(self, version: str) -> None:
        """Serve another version from now on; requests under way end with the one that they have.

        Raises:
            VersionRefused: it cannot be loaded or does not run, and the version before it serves on.
        """
        async with self._one_at_a_time:
            if version == self.now.manifest.version:
                return
            try:
                new = await to_thread.run_sync(self._start, version)
            except Exception as error:  # of the store, of the engine's library: whatever it is, nothing changes
                raise VersionRefused(f"version {version} cannot be served: {error}") from error
            new.batcher.start()
            old = self.now
            self._serve(new)
            LOG.info("serving version %s in place of %s", version, old.manifest.version)
            task = asyncio.create_task(_retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def follow(
        self,
        current: Callable[[], tuple[str, object]],
        seen: tuple[str, object],
        *,
        every_s: float,
        on_refusal: Callable[[], None],
    ) -> None:
        """Serve what the store's `current` names, for ever; what is wrong with it is told once.

        Args:
            current: the version and anything that changes whenever it is promoted again.
            seen: what `current` gave before the first version was loaded.
            every_s: seconds between two looks; 0 never looks.
        """
        told = ""
        while every_s:
            await asyncio.sleep(every_s)
            try:
                if (named := await to_thread.run_sync(current)) != seen:
                    seen, told = named, ""
                    await self.replace(named[0])
            except Exception as error:  # a store that cannot be read now may be readable at the next look
                if str(error) != told:
                    told = str(error)
                    LOG.error("the version before serves on: %s", error)
                    on_refusal()


async def _retire(old: Running) -> None:
    while old.users:
        old.unused.clear()
        await old.unused.wait()
    await old.batcher.stop()
    del old  # frees it
    await to_thread.run_sync(give_back)
