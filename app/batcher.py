"""One bounded queue before one device. A batch leaves as soon as the device is free."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
HOPE = 0.7  # of a request's time that the queue may take; the rest is for decoding, and for a pace that a flood slows


class Outputs(Protocol):
    """What a forward pass gives: arrays whose first axis is the batch."""

    @property
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def cam(self) -> NDArray[np.float32]: ...
    @property
    def features(self) -> NDArray[np.float32] | None: ...


class QueueFull(Exception):
    """No room, or no hope to be in time; `retry_after_s` says when there should be some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server has all the work it can do: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The request's time ran out before its result."""


class NotFinite(Exception):
    """The model answered an image with NaN or infinity."""


class ShuttingDown(Exception):
    """The server is stopping and takes no more work."""


class DeviceFailed(Exception):
    """The device will never answer again: the process has to be replaced."""


@dataclass(frozen=True)
class Result:
    """One image's share of a batch."""

    logits: NDArray[np.float32]  # [K]
    cam: NDArray[np.float32]  # [K,H,W]
    features: NDArray[np.float32] | None  # [C], what the head sees; None where the engine does not tell
    queue_s: float  # until its batch left the queue
    batch_s: float  # from there until the device had it
    forward_s: float
    ended: float  # of the forward pass, on `time.monotonic`
    batch_size: int
    shared: object = None  # what `around` gave for its batch


@dataclass(eq=False)
class _Image:
    pixels: NDArray[np.uint8]
    future: asyncio.Future[Result]
    arrived: float
    context: Context  # of the caller
    taken: bool = False  # to the device


@dataclass(eq=False)
class _Call:
    work: Callable[[], Any]
    future: asyncio.Future[Any]
    taken: bool = False


def _never(_: Exception) -> bool:
    return False


class MicroBatcher:
    """Joins concurrent `submit`s into batches for `run`; all its state lives on the event loop, so there is no lock.

    Args:
        run: uint8[B,...] -> outputs with B rows.
        max_batch: images per batch at most.
        max_wait_ms: how long an idle device waits for a fuller batch; 0 sends at once.
        max_queue: images that `admit` lets in at once.
        in_flight: batches in `run` at once, each in a thread; more than one only where the device overlaps them.
        on_drop: told why, `client_gone` or `deadline`, for each image that will not be run.
        is_fatal: whether an error of `run` means that the device is lost; then nothing is run any more.
        around: entered around each run of a batch, with the contexts that its images were submitted in.
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
        is_fatal: Callable[[Exception], bool] = _never,
        around: Callable[[Sequence[Context]], AbstractContextManager[object]] = lambda _: nullcontext(),
    ) -> None:
        self._compute = run
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._waiting: deque[_Image | _Call] = deque()
        self._background: deque[_Image | _Call] = deque()  # runs where nothing else waits
        self._arrival = asyncio.Event()
        self._in_flight = in_flight
        self._on_drop = on_drop
        self._is_fatal = is_fatal
        self._around = around
        self._admitted = {True: 0, False: 0}  # images let in and not answered yet; True: in the background
        self._callers: set[asyncio.Future[Any]] = set()  # who waits for an answer
        self._running: dict[object, float] = {}  # what is on the device -> since when
        self._failure: str | None = None
        self._device = ThreadPoolExecutor(in_flight, thread_name_prefix="device")
        self._forwards: set[asyncio.Task[None]] = set()  # batches on the device now
        self._loop_task: asyncio.Task[None] | None = None
        self._seconds_per_image = 0.1  # a guess until the first batch
        self._closing = False

    @property
    def depth(self) -> int:
        """Images and calls waiting now."""
        return len(self._waiting) + len(self._background)

    @property
    def accepting(self) -> bool:
        running = self._loop_task is not None and not self._loop_task.done()
        return running and not self._closing and not self._failure

    @property
    def failure(self) -> str | None:
        """Why the device is lost, or None."""
        return self._failure

    @property
    def oldest_run_s(self) -> float:
        """Seconds for which the oldest batch or call has been on the device; from any thread."""
        started = list(self._running.values())
        return time.monotonic() - min(started) if started else 0.0

    def start(self) -> None:
        """Begin to form batches; call from the event loop."""
        self._loop_task = asyncio.create_task(self._form_batches(), name="batcher")

    async def stop(self) -> None:
        """Take no more work, finish what was accepted, and end the device threads."""
        self._closing = True
        self._arrival.set()
        if self._loop_task is not None and not self._failure:
            await asyncio.wait([self._loop_task])  # which `fail` may cancel meanwhile
        self._device.shutdown(wait=not self._failure)

    def fail(self, reason: str) -> None:
        """Give the device up: who waits or comes is told `DeviceFailed`. A thread that is stuck stays so."""
        self._failure = reason
        for caller in list(self._callers):
            if not caller.done():
                caller.set_exception(DeviceFailed(reason))
        if self._loop_task is not None:
            self._loop_task.cancel()

    @contextmanager
    def admit(self, images: int = 1, *, timeout_s: float, background: bool = False) -> Iterator[None]:
        """Let images in before any work goes into them; they have their places until they are answered.

        Raises:
            As `refuse_if_full`.
        """
        self.refuse_if_full(images, timeout_s=timeout_s, background=background)
        self._admitted[background] += images
        try:
            yield
        finally:
            self._admitted[background] -= images

    def refuse_if_full(self, images: int = 1, *, timeout_s: float, background: bool = False) -> None:
        """Raise where `admit` would, and take no place: a body that is still to come, slowly maybe, keeps nobody out.

        Work in the background has half the places, so that it never keeps the rest out.

        Raises:
            QueueFull: there is no place, or a long queue before these images will not be done within `timeout_s`.
            ShuttingDown, DeviceFailed.
        """
        self._refuse_unless_accepting()
        everyone = sum(self._admitted.values())
        before = everyone if background else self._admitted[False]
        wait_s = before * self._seconds_per_image
        # A few batches say little about the pace, and their deadline is soon told
        hopeless = before > 2 * self._in_flight * self._max_batch and wait_s > HOPE * timeout_s
        places = max(1, self._max_queue // 2) if background else self._max_queue
        if everyone + images > places or hopeless:
            raise QueueFull(max(1, math.ceil(wait_s)))

    async def submit(self, image: NDArray[np.uint8], *, timeout_s: float, background: bool = False) -> Result:
        """Queue one uint8[3,S,S] image and wait for its result; every image of a batcher has the same shape.

        Args:
            background: let every image that is not in the background go first, however late it comes.

        Raises:
            DeadlineExceeded, ShuttingDown, DeviceFailed, NotFinite, or what `run` raised for this image alone.
        """
        item = _Image(image, asyncio.get_running_loop().create_future(), time.monotonic(), copy_context())
        await self._wait(item, self._background if background else self._waiting, timeout_s)
        return item.future.result()

    async def call(self, work: Callable[[], T], *, timeout_s: float) -> T:
        """Queue other work for the device, in its turn and never beside a batch, and wait for its result.

        Raises:
            DeadlineExceeded, ShuttingDown, DeviceFailed, or what `work` raised.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        await self._wait(_Call(work, future), self._waiting, timeout_s)
        return future.result()

    async def _wait(self, item: _Image | _Call, queue: deque[_Image | _Call], timeout_s: float) -> None:
        """Queue an item until it is answered, or forget it where its caller leaves or runs out of time."""
        self._refuse_unless_accepting()
        queue.append(item)
        self._arrival.set()
        self._callers.add(item.future)
        try:
            async with asyncio.timeout(timeout_s):
                await item.future
        except TimeoutError:
            self._drop(item, queue, "deadline")
            raise DeadlineExceeded(f"no result within {timeout_s:g} s: try again, or allow more time") from None
        except asyncio.CancelledError:
            self._drop(item, queue, "client_gone")
            raise
        finally:
            self._callers.discard(item.future)

    def _drop(self, item: _Image | _Call, queue: deque[_Image | _Call], reason: str) -> None:
        if item in queue:
            queue.remove(item)
        if not item.taken:
            self._on_drop(reason)

    def _refuse_unless_accepting(self) -> None:
        if self._failure:
            raise DeviceFailed(self._failure)
        if not self.accepting:
            raise ShuttingDown("the server is starting or stopping: try another replica")

    async def _form_batches(self) -> None:
        while not (self._closing and not self.depth):
            await self._arrival.wait()
            if self._max_wait_s and self.depth < self._max_batch and not self._closing:
                await asyncio.sleep(self._max_wait_s)
            await self._run(self._take())  # in no variable here: an idle server keeps nobody's image
            if not self.depth and not self._closing:
                self._arrival.clear()
        await self._until_running(0)

    async def _run(self, work: list[_Image] | _Call) -> None:
        if isinstance(work, _Call):
            await self._until_running(0)
            await self._run_alone(work)
        elif work:
            forward = asyncio.create_task(self._forward(work))
            self._forwards.add(forward)
            forward.add_done_callback(self._forwards.discard)
            # The next batch is formed when it can run, and takes in what arrives until then
            await self._until_running(self._in_flight - 1)

    async def _until_running(self, most: int) -> None:
        """Wait until at most so many batches are on the device."""
        while len(self._forwards) > most:
            await asyncio.wait(self._forwards, return_when=asyncio.FIRST_COMPLETED)

    def _take(self) -> list[_Image] | _Call:
        """The next batch or call."""
        batch: list[_Image] = []
        while (queue := self._waiting or self._background) and len(batch) < self._max_batch:
            item = queue.popleft()
            if item.future.done():  # its caller has been told to leave and did not come to it yet
                continue
            if isinstance(item, _Call) and batch:
                queue.appendleft(item)  # its turn comes after this batch
                break
            item.taken = True
            if isinstance(item, _Call):
                return item
            batch.append(item)
        return batch

    async def _run_alone(self, call: _Call) -> None:
        """Run a call; whatever goes wrong is told to its caller, and never ends the loop."""
        try:
            result = await self._on_device(call.work)
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
            if self._is_fatal(error):
                self.fail(f"the device is lost: {error}")
            elif len(batch) > 1:
                await self._forward(batch[: len(batch) // 2])
                if not self._failure:
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

    async def _on_device(self, work: Callable[[], T]) -> T:
        token = object()
        self._running[token] = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._device, work)
        finally:
            del self._running[token]

    async def _run_batch(self, batch: list[_Image]) -> list[Result]:
        taken = begun = time.monotonic()
        images = np.stack([item.pixels for item in batch])

        def compute() -> Outputs:
            nonlocal begun
            begun = time.monotonic()
            return self._compute(images)

        with self._around([item.context for item in batch]) as shared:
            outputs = await self._on_device(compute)
        ended = time.monotonic()
        at_once = max(1, len(self._forwards))
        self._seconds_per_image = 0.9 * self._seconds_per_image + 0.1 * (ended - taken) / len(batch) / at_once
        features = outputs.features if outputs.features is not None else [None] * len(batch)
        return [
            Result(
                logits=outputs.logits[row],
                cam=outputs.cam[row],
                features=features[row],
                queue_s=taken - item.arrived,
                batch_s=begun - taken,
                forward_s=ended - begun,
                ended=ended,
                batch_size=len(batch),
                shared=shared,
            )
            for row, item in enumerate(batch)
        ]
