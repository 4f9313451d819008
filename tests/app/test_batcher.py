"""Batching as its callers see it; the device is a function that waits until the test lets it go."""

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from app.batcher import DeadlineExceeded, DeviceFailed, MicroBatcher, NotFinite, QueueFull, Result, ShuttingDown


class Outputs(NamedTuple):
    logits: NDArray[np.float32]
    cam: NDArray[np.float32]
    features: NDArray[np.float32] | None = None


class Device:
    """Answers an image with its own first value; holds every batch while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.broken = False

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        values = images.reshape(len(images), -1)[:, 0].astype(np.float32)
        self.batches.append([int(v) for v in values])
        self.began.set()
        assert self.gate.wait(10)
        if self.broken:
            raise RuntimeError("the device failed")
        return Outputs(np.stack([values, -values], axis=1), np.tile(values[:, None, None, None], (1, 2, 14, 14)))


def image(value: int) -> NDArray[np.uint8]:
    return np.full((3, 2, 2), value, dtype=np.uint8)


@asynccontextmanager
async def running(device: Device, **options: Any) -> AsyncIterator[MicroBatcher]:
    batcher = MicroBatcher(device.run, **({"max_batch": 4, "max_wait_ms": 0, "max_queue": 100} | options))
    batcher.start()
    try:
        yield batcher
    finally:
        device.gate.set()
        await batcher.stop()


def one_by_one(let_go: list[threading.Event]) -> Callable[[NDArray[np.uint8]], Outputs]:
    """A device that holds each image until its own event comes."""
    device = Device()

    def forward(images: NDArray[np.uint8]) -> Outputs:
        assert let_go[images.flat[0]].wait(10)
        return device.run(images)

    return forward


def device_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("device")}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def occupy(batcher: MicroBatcher, device: Device) -> "asyncio.Task[Result]":
    """Put one image on the device and hold it there."""
    device.gate.clear()
    device.began.clear()
    first = asyncio.create_task(batcher.submit(image(0), timeout_s=10))
    await asyncio.to_thread(device.began.wait, 10)
    return first


async def queued(batcher: MicroBatcher, values: list[int], timeout_s: float = 10) -> "list[asyncio.Task[Result]]":
    tasks = [asyncio.create_task(batcher.submit(image(v), timeout_s=timeout_s)) for v in values]
    await asyncio.sleep(0)
    return tasks


def test_each_caller_gets_its_own_row() -> None:
    async def test() -> None:
        async with running(Device()) as batcher:
            results = await asyncio.gather(*(batcher.submit(image(v), timeout_s=10) for v in range(23)))
        assert [int(r.logits[0]) for r in results] == list(range(23))
        assert [(r.cam.shape, int(r.cam[1, 0, 0])) for r in results] == [((2, 14, 14), v) for v in range(23)]

    run(test)


def test_a_result_says_how_long_it_waited_and_how_long_its_batch_took() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            sent = time.monotonic()
            (second,) = await queued(batcher, [1])
            await asyncio.sleep(0.02)
            device.gate.set()
            results = await asyncio.gather(first, second)
            elapsed = time.monotonic() - sent
        assert results[0].forward_s >= 0.02
        assert results[1].queue_s >= 0.02
        assert results[1].batch_s >= 0
        assert results[1].queue_s + results[1].batch_s + results[1].forward_s <= elapsed

    run(test)


def retry_after_s(batcher: MicroBatcher) -> int:
    """What a caller behind 100,000 images is told: their number at the pace of the device."""
    with batcher.admit(100_000, timeout_s=1e9), pytest.raises(QueueFull, match="try again in") as refused:
        batcher.admit(timeout_s=1e9).__enter__()
    return refused.value.retry_after_s


def test_when_to_return_follows_the_pace_of_the_device() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, max_queue=100_000) as batcher:
            assert retry_after_s(batcher) == 10_000  # 0.1 s an image, until a batch has been seen
            first = await occupy(batcher, device)
            rest = await queued(batcher, [1, 2, 3, 4])
            await asyncio.sleep(0.02)
            device.gate.set()
            pace = 0.1
            for batch in (await asyncio.gather(first, *rest))[:2]:
                pace = 0.9 * pace + 0.1 * (batch.batch_s + batch.forward_s) / batch.batch_size
            assert retry_after_s(batcher) == math.ceil(100_000 * pace)

    run(test)


def test_the_pace_of_batches_beside_one_another_is_that_of_all_of_them() -> None:
    async def test() -> None:
        let_go = [threading.Event(), threading.Event()]
        batcher = MicroBatcher(one_by_one(let_go), max_batch=1, max_wait_ms=0, max_queue=100_000, in_flight=2)
        batcher.start()
        both = await queued(batcher, [0, 1])
        await asyncio.sleep(0.05)
        pace = 0.1
        for event, task, at_once in zip(let_go, both, (2, 1), strict=True):
            event.set()
            batch = await task
            pace = 0.9 * pace + 0.1 * (batch.batch_s + batch.forward_s) / at_once
            assert retry_after_s(batcher) == math.ceil(100_000 * pace)
        await batcher.stop()

    run(test)


def test_what_waits_while_the_device_is_busy_leaves_together() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            rest = await queued(batcher, [1, 2, 3, 4, 5, 6])
            assert batcher.depth == 6
            device.gate.set()
            results = await asyncio.gather(first, *rest)
        assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [r.batch_size for r in results] == [1, 4, 4, 4, 4, 2, 2]

    run(test)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_as_many_batches_are_in_flight_as_the_device_takes(in_flight: int) -> None:
    async def test() -> None:
        device = Device()
        async with running(device, in_flight=in_flight, max_batch=2) as batcher:
            device.gate.clear()
            tasks = []
            for number in range(in_flight):  # each leaves at once while the device has room
                tasks += await queued(batcher, [number])
                for _ in range(1000):
                    if len(device.batches) > number:
                        break
                    await asyncio.sleep(0.001)
            tasks += await queued(batcher, [10, 11, 12])
            await asyncio.sleep(0.02)
            assert device.batches == [[number] for number in range(in_flight)]
            assert batcher.depth == 3  # the next batch is formed when it can run
            device.gate.set()
            results = await asyncio.gather(*tasks)
        assert [10, 11] in device.batches
        assert [int(r.logits[0]) for r in results] == [*range(in_flight), 10, 11, 12]

    run(test)


def test_images_in_the_background_run_where_nothing_else_waits() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, max_batch=2) as batcher:
            first = await occupy(batcher, device)
            later = [asyncio.create_task(batcher.submit(image(v), timeout_s=10, background=True)) for v in (10, 11, 12)]
            await asyncio.sleep(0)
            sooner = await queued(batcher, [1])
            call = asyncio.create_task(batcher.call(lambda: device.batches.append([99]), timeout_s=10))
            await asyncio.sleep(0)
            device.gate.set()
            await asyncio.gather(first, call, *later, *sooner)
        assert device.batches == [[0], [1], [99], [10, 11], [12]]

    run(test)


def test_a_call_has_the_device_to_itself() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, in_flight=2) as batcher:
            first = await occupy(batcher, device)
            began = threading.Event()
            call = asyncio.create_task(batcher.call(began.set, timeout_s=10))
            (later,) = await queued(batcher, [5])
            await asyncio.sleep(0.02)
            assert not began.is_set()
            device.gate.set()
            await asyncio.gather(first, call, later)
        assert device.batches == [[0], [5]]

    run(test)


def test_stopping_finishes_every_batch_in_flight() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, in_flight=2) as batcher:
            first = await occupy(batcher, device)
            device.began.clear()
            (second,) = await queued(batcher, [1])
            await asyncio.to_thread(device.began.wait, 10)
            stopping = asyncio.create_task(batcher.stop())
            await asyncio.sleep(0.01)
            device.gate.set()
            await stopping
            assert [int(r.logits[0]) for r in await asyncio.gather(first, second)] == [0, 1]

    run(test)


def test_an_idle_device_waits_only_where_it_was_told_to() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, max_wait_ms=50) as batcher:
            first = asyncio.create_task(batcher.submit(image(1), timeout_s=10))
            await asyncio.sleep(0.005)
            await asyncio.gather(first, batcher.submit(image(2), timeout_s=10))
        assert device.batches == [[1, 2]]

    run(test)


def test_a_full_batch_waits_for_nothing() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, max_wait_ms=3_600_000) as batcher:
            await asyncio.gather(*await queued(batcher, [1, 2, 3, 4], timeout_s=10))
        assert device.batches == [[1, 2, 3, 4]]

    run(test)


def test_work_is_refused_before_it_begins_and_told_when_to_return() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=3) as batcher:
            with batcher.admit(timeout_s=10), batcher.admit(2, timeout_s=10):
                with pytest.raises(QueueFull) as refused, batcher.admit(timeout_s=10):
                    pass
                assert refused.value.retry_after_s == 1
            with pytest.raises(QueueFull), batcher.admit(4, timeout_s=10):
                pass
            with batcher.admit(3, timeout_s=10):  # the places are free again
                pass

    run(test)


def test_asking_whether_there_is_a_place_takes_none() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=1) as batcher:
            for _ in range(3):
                batcher.refuse_if_full(timeout_s=10)
            with batcher.admit(timeout_s=10), pytest.raises(QueueFull):
                batcher.refuse_if_full(timeout_s=10)

    run(test)


def test_the_background_never_takes_the_places_of_the_rest() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=4) as batcher:
            with batcher.admit(2, timeout_s=10, background=True):
                with pytest.raises(QueueFull), batcher.admit(timeout_s=10, background=True):
                    pass
                with batcher.admit(2, timeout_s=10):
                    pass

    run(test)


def test_what_cannot_be_in_time_behind_a_long_queue_is_refused() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=100, max_batch=2) as batcher:
            with batcher.admit(4, timeout_s=0.001), batcher.admit(timeout_s=0.001):  # too few to know
                with pytest.raises(QueueFull), batcher.admit(timeout_s=0.001):
                    pass
                with batcher.admit(timeout_s=100):
                    pass

    run(test)


def test_the_limits_of_what_is_in_time_are_themselves_admitted() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=100, max_batch=2, in_flight=2) as batcher:
            with batcher.admit(8, timeout_s=100):  # two batches for each thread
                batcher.refuse_if_full(timeout_s=0.001)
            with batcher.admit(10, timeout_s=100):  # 1 s at 0.1 s an image, and seven tenths of the time are for it
                batcher.refuse_if_full(timeout_s=1.43)
                with pytest.raises(QueueFull):
                    batcher.refuse_if_full(timeout_s=1.42)

    run(test)


def test_the_background_waits_for_everyone_and_nobody_for_it() -> None:
    async def test() -> None:
        async with running(Device(), max_queue=100, max_batch=2) as batcher:
            with batcher.admit(20, timeout_s=100, background=True):
                batcher.refuse_if_full(timeout_s=0.001)
                with pytest.raises(QueueFull):
                    batcher.refuse_if_full(timeout_s=0.001, background=True)
        async with running(Device(), max_queue=3) as batcher:
            with batcher.admit(timeout_s=10, background=True):
                batcher.refuse_if_full(2, timeout_s=10)
                with pytest.raises(QueueFull):
                    batcher.refuse_if_full(timeout_s=10, background=True)

    run(test)


def test_a_lost_device_is_told_to_everyone_and_nothing_runs_any_more() -> None:
    class Lost(Exception):
        pass

    async def test() -> None:
        ran = []

        def forward(images: NDArray[np.uint8]) -> Outputs:
            ran.append(len(images))
            raise Lost("an illegal memory access was encountered")

        batcher = MicroBatcher(
            forward, max_batch=2, max_wait_ms=20, max_queue=9, is_fatal=lambda error: isinstance(error, Lost)
        )
        batcher.start()
        waiting = [asyncio.create_task(batcher.submit(image(v), timeout_s=10)) for v in range(5)]
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in told] == [DeviceFailed] * 5
        assert ran == [2]  # not in halves
        assert batcher.failure == "the device is lost: an illegal memory access was encountered"
        assert not batcher.accepting
        with pytest.raises(DeviceFailed), batcher.admit(timeout_s=1):
            pass
        await batcher.stop()

    run(test)


def test_giving_up_a_stuck_device_frees_those_who_wait_for_it() -> None:
    async def test() -> None:
        device, before = Device(), device_threads()
        async with running(device) as batcher:
            assert batcher.oldest_run_s == 0
            assert batcher.failure is None
            stuck = await occupy(batcher, device)
            (thread,) = device_threads() - before
            rest = await queued(batcher, [1, 2])
            await asyncio.sleep(0.02)
            assert batcher.oldest_run_s >= 0.02
            batcher.fail("a forward pass is stuck")
            told = await asyncio.gather(stuck, *rest, return_exceptions=True)
            assert [(type(error), str(error)) for error in told] == [(DeviceFailed, "a forward pass is stuck")] * 3
            with pytest.raises(DeviceFailed, match="a forward pass is stuck"):
                await batcher.submit(image(3), timeout_s=1)
            await batcher.stop()
            assert thread.is_alive()  # nothing waits for it
            assert "batcher" not in {task.get_name() for task in asyncio.all_tasks()}
        assert device.batches == [[0]]

    run(test)


def test_a_passed_deadline_is_told_and_never_runs() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            (late,) = await queued(batcher, [1], timeout_s=0.01)
            with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
                await late
            device.gate.set()
            await first
        assert device.batches == [[0]]

    run(test)


def test_a_caller_that_left_is_dropped_before_its_batch_forms() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            gone, stays = await queued(batcher, [1, 2])
            gone.cancel()
            await asyncio.sleep(0)
            device.gate.set()
            await asyncio.gather(first, stays)
        assert device.batches == [[0], [2]]

    run(test)


def test_a_caller_that_leaves_as_its_batch_forms_is_left_out_of_it() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first, gone, last = await queued(batcher, [1, 2, 3])
            gone.cancel()  # it learns this after the batcher has looked into the queue
            await asyncio.gather(first, last)
        assert device.batches == [[1, 3]]

    run(test)


def test_an_answer_is_forgotten_once_it_is_given() -> None:
    async def test() -> None:
        async with running(Device()) as batcher:
            answer = await batcher.call(lambda: np.zeros(1), timeout_s=10)
            kept = weakref.ref(answer)
            del answer
            await asyncio.sleep(0.01)
            gc.collect()
            assert kept() is None

    run(test)


def test_a_caller_that_leaves_during_the_forward_pass_harms_nobody() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            first.cancel()
            device.gate.set()
            result = await batcher.submit(image(5), timeout_s=10)
        assert int(result.logits[0]) == 5

    run(test)


def test_the_rest_of_a_batch_is_answered_though_its_first_caller_left() -> None:
    async def test() -> None:
        device = Device()
        async with running(device, max_wait_ms=20) as batcher:
            device.gate.clear()
            gone, stays = await queued(batcher, [1, 2])
            await asyncio.to_thread(device.began.wait, 10)
            gone.cancel()
            await asyncio.sleep(0)
            device.gate.set()
            assert int((await stays).logits[0]) == 2
        assert device.batches == [[1, 2]]

    run(test)


def test_a_failed_forward_pass_is_told_to_its_batch_and_the_next_one_runs() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            device.broken = True
            for outcome in await asyncio.gather(*await queued(batcher, [1, 2]), return_exceptions=True):
                assert isinstance(outcome, RuntimeError)
            device.broken = False
            assert int((await batcher.submit(image(3), timeout_s=10)).logits[0]) == 3

    run(test)


@pytest.mark.parametrize("culprits", [{3}, {0, 6}, {1, 2, 3}])
def test_of_a_batch_that_fails_only_the_images_fail_that_make_it_fail(culprits: set[int]) -> None:
    async def test() -> None:
        device = Device()

        def forward(images: NDArray[np.uint8]) -> Outputs:
            outputs = device.run(images)
            if culprits & {int(v) for v in outputs.logits[:, 0]}:
                raise RuntimeError("this image breaks the kernel")
            return outputs

        batcher = MicroBatcher(forward, max_batch=8, max_wait_ms=20, max_queue=20)
        batcher.start()
        outcomes = await asyncio.gather(*await queued(batcher, list(range(7))), return_exceptions=True)
        await batcher.stop()
        for value, outcome in enumerate(outcomes):
            if value in culprits:
                assert isinstance(outcome, RuntimeError)
            else:
                assert isinstance(outcome, Result)
                assert int(outcome.logits[0]) == value

    run(test)


def test_a_batch_too_large_for_the_device_runs_in_halves() -> None:
    async def test() -> None:
        device = Device()

        def forward(images: NDArray[np.uint8]) -> Outputs:
            if len(images) > 2:
                raise MemoryError
            return device.run(images)

        batcher = MicroBatcher(forward, max_batch=8, max_wait_ms=20, max_queue=20)
        batcher.start()
        results = await asyncio.gather(*await queued(batcher, list(range(8))))
        await batcher.stop()
        assert [int(r.logits[0]) for r in results] == list(range(8))
        assert device.batches == [[0, 1], [2, 3], [4, 5], [6, 7]]

    run(test)


def test_an_answer_that_is_not_finite_fails_its_image_alone() -> None:
    async def test() -> None:
        device = Device()

        def forward(images: NDArray[np.uint8]) -> Outputs:
            outputs = device.run(images)
            outputs.logits[outputs.logits[:, 0] == 1] = np.nan
            return outputs

        batcher = MicroBatcher(forward, max_batch=4, max_wait_ms=20, max_queue=20)
        batcher.start()
        outcomes = await asyncio.gather(*await queued(batcher, [0, 1, 2]), return_exceptions=True)
        await batcher.stop()
        assert [type(outcome) for outcome in outcomes] == [Result, NotFinite, Result]
        assert str(outcomes[1]) == "the model gave no finite answer"

    run(test)


def test_what_is_never_run_is_told_with_its_reason() -> None:
    async def test() -> None:
        device, reasons = Device(), list[str]()
        async with running(device, on_drop=reasons.append) as batcher:
            first = await occupy(batcher, device)
            (late,) = await queued(batcher, [1], timeout_s=0.01)
            gone, stays = await queued(batcher, [2, 3])
            gone.cancel()
            with pytest.raises(DeadlineExceeded):
                await late
            device.gate.set()
            await asyncio.gather(first, stays)
            running_now = await occupy(batcher, device)
            running_now.cancel()  # too late to save the work: it is not a drop
            await asyncio.sleep(0)
        assert sorted(reasons) == ["client_gone", "deadline"]

    run(test)


def test_an_engine_that_answers_too_few_rows_fails_its_batch_alone() -> None:
    async def test() -> None:
        device, broken = Device(), True

        def forward(images: NDArray[np.uint8]) -> Outputs:
            outputs = device.run(images)
            return Outputs(outputs.logits[:0], outputs.cam[:0]) if broken else outputs

        batcher = MicroBatcher(forward, max_batch=4, max_wait_ms=0, max_queue=4)
        batcher.start()
        with pytest.raises(IndexError):
            await batcher.submit(image(1), timeout_s=10)
        broken = False
        assert int((await batcher.submit(image(2), timeout_s=10)).logits[0]) == 2
        await batcher.stop()

    run(test)


def test_stopping_finishes_what_was_accepted_and_takes_no_more() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            rest = await queued(batcher, [1, 2])
            stopping = asyncio.create_task(batcher.stop())
            await asyncio.sleep(0)
            assert not batcher.accepting
            with pytest.raises(ShuttingDown):
                await batcher.submit(image(3), timeout_s=10)
            device.gate.set()
            await asyncio.gather(first, *rest, stopping)
        assert device.batches == [[0], [1, 2]]

    run(test)


def test_stopping_ends_when_the_last_batch_in_flight_is_answered() -> None:
    async def test() -> None:
        let_go = [threading.Event(), threading.Event()]
        batcher = MicroBatcher(one_by_one(let_go), max_batch=1, max_wait_ms=0, max_queue=2, in_flight=2)
        batcher.start()
        tasks = await queued(batcher, [0, 1])
        stopping = asyncio.create_task(batcher.stop())
        let_go[0].set()
        await tasks[0]
        await asyncio.sleep(0.01)  # the event loop goes on, and `stop` waits
        assert not stopping.done()
        let_go[1].set()
        await stopping
        assert tasks[1].done()

    run(test)


def test_the_next_batch_leaves_as_soon_as_one_of_those_in_flight_is_done() -> None:
    async def test() -> None:
        let_go = [threading.Event() for _ in range(3)]
        batcher = MicroBatcher(one_by_one(let_go), max_batch=1, max_wait_ms=0, max_queue=3, in_flight=2)
        batcher.start()
        first, held, last = await queued(batcher, [0, 1, 2])
        let_go[0].set()
        let_go[2].set()
        await asyncio.gather(first, last)
        assert not held.done()
        let_go[1].set()
        await held
        await batcher.stop()

    run(test)


def test_a_batcher_that_was_not_started_refuses() -> None:
    async def test() -> None:
        batcher = MicroBatcher(Device().run, max_batch=1, max_wait_ms=0, max_queue=1)
        with pytest.raises(ShuttingDown, match=r"^the server is starting or stopping: try another replica$"):
            await batcher.submit(image(1), timeout_s=1)

    run(test)


def test_the_device_is_never_used_twice_at_a_time() -> None:
    async def test() -> None:
        inside = 0

        def forward(images: NDArray[np.uint8]) -> Outputs:
            nonlocal inside
            inside += 1
            assert inside == 1
            threading.Event().wait(0.001)
            inside -= 1
            return Outputs(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2, 1, 1), np.float32))

        batcher = MicroBatcher(forward, max_batch=2, max_wait_ms=0, max_queue=200)
        batcher.start()
        waiting: list[Awaitable[Result]] = [batcher.submit(image(1), timeout_s=10) for _ in range(60)]
        await asyncio.gather(*waiting)
        await batcher.stop()

    run(test)


def test_a_call_waits_its_turn_between_two_batches_on_the_same_thread() -> None:
    async def test() -> None:
        device, seen = Device(), []

        def work() -> str:
            seen.append((threading.current_thread().name, list(device.batches)))
            return "done"

        async with running(device) as batcher:
            first = await occupy(batcher, device)
            before = await queued(batcher, [1, 2])
            call = asyncio.create_task(batcher.call(work, timeout_s=10))
            await asyncio.sleep(0)
            after = await queued(batcher, [3])
            assert batcher.depth == 4
            device.gate.set()
            await asyncio.gather(first, *before, *after)
            assert await call == "done"
        assert device.batches == [[0], [1, 2], [3]]
        ((thread, done_before),) = seen
        assert thread.startswith("device")
        assert done_before == [[0], [1, 2]]

    run(test)


def test_a_failed_call_is_told_to_its_caller_alone_and_the_next_batch_runs() -> None:
    async def test() -> None:
        def fail() -> None:
            raise RuntimeError("no gradient")

        async with running(Device()) as batcher:
            outcomes = await asyncio.gather(
                batcher.call(fail, timeout_s=10), batcher.submit(image(3), timeout_s=10), return_exceptions=True
            )
            assert isinstance(outcomes[0], RuntimeError)
            assert isinstance(outcomes[1], Result)

    run(test)


def test_a_call_is_bound_by_the_deadline_and_its_caller() -> None:
    async def test() -> None:
        device, ran = Device(), []
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            late = asyncio.create_task(batcher.call(lambda: ran.append("late"), timeout_s=0.01))
            gone = asyncio.create_task(batcher.call(lambda: ran.append("gone"), timeout_s=10))
            await asyncio.sleep(0)
            assert batcher.depth == 2
            gone.cancel()
            with pytest.raises(DeadlineExceeded):
                await late
            assert batcher.depth == 0  # what nobody waits for holds no memory
            device.gate.set()
            await first
        assert ran == []
        with pytest.raises(ShuttingDown):
            await batcher.call(lambda: ran.append("stopped"), timeout_s=10)

    run(test)


def test_stopping_finishes_an_accepted_call() -> None:
    async def test() -> None:
        device = Device()
        async with running(device) as batcher:
            first = await occupy(batcher, device)
            call = asyncio.create_task(batcher.call(lambda: 7, timeout_s=10))
            await asyncio.sleep(0)
            stopping = asyncio.create_task(batcher.stop())
            await asyncio.sleep(0)
            device.gate.set()
            assert await call == 7
            await asyncio.gather(first, stopping)

    run(test)
