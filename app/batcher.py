"""One bounded queue before one device. A batch leaves as soon as the device is free."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Outputs(Protocol):
    """What a forward pass gives: arrays whose first axis is the batch."""

    @property
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def cam(self) -> NDArray[np.float32]: ...


class QueueFull(Exception):
    """No room; `retry_after_s` says when there should be some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full: try again shortly")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The request's time ran out before its result."""


class NotFinite(Exception):
    """The model answered an image with NaN or infinity."""


class ShuttingDown(Exception):
    """The server is stopping and takes no more work."""


@dataclass(frozen=True)
class Result:
    """One image's share of a batch."""

    logits: NDArray[np.float32]  # [K]
    cam: NDArray[np.float32]  # [K,H,W]
    queue_s: float
    forward_s: float
    batch_size: int


@dataclass
class _Image:
    pixels: NDArray[np.uint8]
    future: asyncio.Future[Result]
    arrived: float
    taken: bool = False  # into a batch


@dataclass(frozen=True)
class _Call:
    work: Callable[[], Any]
    future: asyncio.Future[Any]


class MicroBatcher:
    """Joins concurrent `submit`s into batches for `run`; all its state lives on the event loop, so there is no lock.

    Args:
        run: uint8[B,...] -> outputs with B rows.
        max_batch: images per batch at most.
        max_wait_ms: how long an idle device waits for a fuller batch; 0 sends at once.
        max_queue: images and calls waiting at most.
        in_flight: batches in `run` at once, each in a thread; more than one only where the device overlaps them.
        on_drop: told why, `client_gone` or `deadline`, for each image that will not be run.
    """

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8]], Outputs],
        *,
        max_batch: int,
        max_wait_ms: float,
        max_queue: int,
        in_flight: int = 1,
        on_drop: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._waiting: deque[_Image | _Call] = deque()
        self._background: deque[_Image | _Call] = deque()  # runs where nothing else waits
        self._arrival = asyncio.Event()
        self._in_flight = in_flight
        self._on_drop = on_drop
        self._device = ThreadPoolExecutor(in_flight, thread_name_prefix="device")
        self._forwards: set[asyncio.Task[None]] = set()  # batches on the device now
        self._loop_task: asyncio.Task[None] | None = None
        self._seconds_per_image = 0.1  # a guess until the first batch; feeds Retry-After alone
        self._closing = False

    @property
    def depth(self) -> int:
        """Images and calls waiting now."""
        return len(self._waiting) + len(self._background)

    @property
    def accepting(self) -> bool:
        return self._loop_task is not None and not self._loop_task.done() and not self._closing

    def start(self) -> None:
        """Begin to form batches; call from the event loop."""
        self._loop_task = asyncio.create_task(self._form_batches(), name="batcher")

    async def stop(self) -> None:
        """Take no more work, finish what was accepted, and end the device threads."""
        self._closing = True
        self._arrival.set()
        if self._loop_task is not None:
            await self._loop_task
        self._device.shutdown()

    async def submit(self, image: NDArray[np.uint8], *, timeout_s: float, background: bool = False) -> Result:
        """Queue one uint8[3,S,S] image and wait for its result; every image of a batcher has the same shape.

        Args:
            background: let every image that is not in the background go first, however late it comes.

        Raises:
            QueueFull, DeadlineExceeded, ShuttingDown, NotFinite, or what `run` raised for this image alone.
        """
        item = _Image(image, asyncio.get_running_loop().create_future(), time.monotonic())
        self._enqueue(item, self._background if background else self._waiting)
        try:
            return await _outcome(item.future, timeout_s)
        except (DeadlineExceeded, asyncio.CancelledError) as left:
            if not item.taken:
                self._on_drop("deadline" if isinstance(left, DeadlineExceeded) else "client_gone")
            raise

    async def call(self, work: Callable[[], T], *, timeout_s: float) -> T:
        """Queue other work for the device, in its turn and never beside a batch, and wait for its result.

        Raises:
            QueueFull, DeadlineExceeded, ShuttingDown, or what `work` raised.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._enqueue(_Call(work, future), self._waiting)
        return await _outcome(future, timeout_s)

    def _enqueue(self, item: _Image | _Call, queue: deque[_Image | _Call]) -> None:
        if not self.accepting:
            raise ShuttingDown("the server is stopping: try another replica")
        if self.depth >= self._max_queue:
            raise QueueFull(max(1, math.ceil(self.depth * self._seconds_per_image)))
        queue.append(item)
        self._arrival.set()

    async def _form_batches(self) -> None:
        while not (self._closing and not self.depth):
            await self._arrival.wait()
            if self._max_wait_s and self.depth < self._max_batch and not self._closing:
                await asyncio.sleep(self._max_wait_s)
            work = self._take()
            if isinstance(work, _Call):
                await self._until_running(0)
                await self._run_alone(work)
            elif work:
                forward = asyncio.create_task(self._forward(work))
                self._forwards.add(forward)
                forward.add_done_callback(self._forwards.discard)
                # The next batch is formed when it can run, and takes in what arrives until then
                await self._until_running(self._in_flight - 1)
            if not self.depth and not self._closing:
                self._arrival.clear()
        await self._until_running(0)

    async def _until_running(self, most: int) -> None:
        """Wait until at most so many batches are on the device."""
        while len(self._forwards) > most:
            await asyncio.wait(self._forwards, return_when=asyncio.FIRST_COMPLETED)

    def _take(self) -> list[_Image] | _Call:
        """The next batch or call. A caller that left or ran out of time has cancelled its future, and is dropped."""
        batch: list[_Image] = []
        while (queue := self._waiting or self._background) and len(batch) < self._max_batch:
            item = queue.popleft()
            if item.future.done():
                continue
            if isinstance(item, _Image):
                item.taken = True
                batch.append(item)
            elif batch:
                queue.appendleft(item)  # its turn comes after this batch
                break
            else:
                return item
        return batch

    async def _run_alone(self, call: _Call) -> None:
        """Run a call; whatever goes wrong is told to its caller, and never ends the loop."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._device, call.work)
        except Exception as error:
            if not call.future.done():
                call.future.set_exception(error)
            return
        if not call.future.done():
            call.future.set_result(result)

    async def _forward(self, batch: list[_Image]) -> None:
        """Run a batch and tell its callers; one that fails runs again in halves, so that only what fails alone fails.

        Halving is also what gets a batch through that was too large for the device's memory.
        """
        try:
            results = await self._run_batch(batch)
        except Exception as error:
            if len(batch) > 1:
                await self._forward(batch[: len(batch) // 2])
                await self._forward(batch[len(batch) // 2 :])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        for item, result in zip(batch, results, strict=True):
            if item.future.done():  # the caller may have left during the forward pass
                continue
            if np.isfinite(result.logits).all():
                item.future.set_result(result)
            else:
                item.future.set_exception(NotFinite("the model gave no finite answer"))

    async def _run_batch(self, batch: list[_Image]) -> list[Result]:
        started = time.monotonic()
        images = np.stack([item.pixels for item in batch])
        outputs = await asyncio.get_running_loop().run_in_executor(self._device, self._run, images)
        seconds = time.monotonic() - started
        self._seconds_per_image = 0.9 * self._seconds_per_image + 0.1 * seconds / len(batch)
        return [
            Result(outputs.logits[row], outputs.cam[row], started - item.arrived, seconds, len(batch))
            for row, item in enumerate(batch)
        ]


async def _outcome(future: asyncio.Future[T], timeout_s: float) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await future
    except TimeoutError:
        raise DeadlineExceeded(f"no result within {timeout_s:g} s: try again, or allow more time") from None
