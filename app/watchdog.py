"""A thread that notices when the device or the event loop does not come back."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from app.served import Served

LOG = logging.getLogger(__name__)


def watch(
    served: Served, loop: asyncio.AbstractEventLoop, *, limit_s: float, on_failure: Callable[[str], None]
) -> Callable[[], None]:
    """Look every quarter of `limit_s`, a second at most; returns what ends the watch.

    When the device is lost, a forward pass takes longer than `limit_s`, or the event loop does not answer for as long:
    the batchers fail, so that /readyz is 503 and nobody is left waiting, and `on_failure` is called, once.
    """
    stopped = threading.Event()
    answered = time.monotonic()

    def answer() -> None:
        nonlocal answered
        answered = time.monotonic()

    def trouble() -> str | None:
        batchers = served.batchers  # kept no longer than this look, so that a version that has ended is freed
        if max(batcher.oldest_run_s for batcher in batchers) > limit_s:
            return f"a forward pass has taken more than {limit_s:g} s"
        if time.monotonic() - answered > limit_s:
            return f"the event loop has not answered for more than {limit_s:g} s"
        return next((batcher.failure for batcher in batchers if batcher.failure), None)

    def look() -> None:
        while not stopped.wait(min(1.0, limit_s / 4)):
            if reason := trouble():
                LOG.critical("the server cannot go on: %s", reason)
                for batcher in served.batchers:
                    loop.call_soon_threadsafe(batcher.fail, reason)
                on_failure(reason)
                return
            loop.call_soon_threadsafe(answer)

    threading.Thread(target=look, name="watchdog", daemon=True).start()
    return stopped.set
