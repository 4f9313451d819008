"""The simulator against queueing theory, and against the real batcher on a clock of its own."""

import asyncio
import math
import random
from collections.abc import Callable
from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from load import arrivals
from numpy.typing import NDArray
from simulate import BUSY, LATE, OK, Answer, fitted, model_of, outcome, simulate

from app.batcher import DeadlineExceeded, MicroBatcher, QueueFull
from app.engines.base import Output


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    return list(arrivals(rate, seconds, random.Random(seed)))  # noqa: S311


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_image_a_batch_waits_as_an_m_d_1_queue_does(load: float) -> None:
    """Pollaczek–Khinchine: mean wait ρ·D / 2(1−ρ)."""
    service_s = 0.01
    answers = simulate(
        poisson(load / service_s, 600), lambda *_: service_s, max_batch=1, max_queue=10**9, timeout_s=math.inf
    )
    waited = np.mean([a.seconds - service_s for a in answers])
    assert waited == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)


def test_a_batch_takes_in_what_came_while_the_device_was_busy() -> None:
    answers = simulate([0, 0.1, 0.2, 0.9, 5], lambda batch, _: 1 + 0.5 * batch, max_batch=2)
    assert [(a.arrived, a.seconds) for a in answers] == [
        (0, 1.5),
        (0.1, pytest.approx(3.4)),
        (0.2, pytest.approx(3.3)),
        (0.9, pytest.approx(4.1)),
        (5, pytest.approx(1.5)),
    ]


def test_saturation_is_that_of_full_batches() -> None:
    found = outcome(simulate(poisson(5000, 4), lambda b, _: 0.01 + 0.001 * b, max_batch=8), seconds=4)
    assert found.per_s == pytest.approx(8 / 0.018, rel=0.02)
    assert found.refused > 0.8
    assert found.late == 0


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer, and whose executors take the time that the work says."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.work_s = 0.0  # of the work that runs in an executor, told by the work itself
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            self.now += timeout or 0
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now

    def run_in_executor(self, _: Executor | None, work: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        result = work(*args)
        return self.create_task(asyncio.sleep(self.work_s, result))


def served_by_the_batcher(
    arrived: list[float], service_s: Callable[[int, int], float], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Answer]:
    timeout_s = options.pop("timeout_s")
    batcher: MicroBatcher
    clock = Clock()
    monkeypatch.setattr("app.batcher.time", SimpleNamespace(monotonic=clock.time))

    def engine(images: NDArray[np.uint8]) -> Output:
        clock.work_s = service_s(len(images), len(batcher._forwards) - 1)
        return Output(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2, 1, 1), np.float32))

    async def request(at: float) -> Answer:
        await asyncio.sleep(at - clock.time())
        try:
            with batcher.admit(timeout_s=timeout_s):
                await batcher.submit(np.zeros((3, 1, 1), np.uint8), timeout_s=timeout_s)
        except QueueFull:
            return Answer(at, BUSY, 0)
        except DeadlineExceeded:
            return Answer(at, LATE, timeout_s)
        return Answer(at, OK, clock.time() - at)

    async def all_of_them() -> list[Answer]:
        nonlocal batcher
        batcher = MicroBatcher(engine, **options)
        batcher.start()
        answers = await asyncio.gather(*(request(at) for at in arrived))
        await batcher.stop()
        return answers

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        return runner.run(all_of_them())


@pytest.mark.parametrize(
    ("load", "changes", "seen"),
    [
        (0.5, {}, {OK}),
        (0.9, {}, {OK}),
        (1.5, {}, {OK, BUSY}),  # no place
        (1.5, {"max_queue": 1000, "timeout_s": 1}, {OK, BUSY}),  # no hope
        (0.9, {"timeout_s": 0.1}, {OK, BUSY, LATE}),
        (0.5, {"max_wait_s": 0.02}, {OK}),
        (0.5, {"in_flight": 2}, {OK}),
        (1.5, {"in_flight": 2}, {OK, BUSY}),
        (1.5, {"in_flight": 2, "timeout_s": 0.1}, {OK, BUSY, LATE}),
    ],
)
def test_every_answer_is_the_batchers(
    monkeypatch: pytest.MonkeyPatch, load: float, changes: dict[str, float], seen: set[int]
) -> None:
    def service_s(batch: int, others: int) -> float:
        return (0.02 + 0.01 * batch) * (1 + 0.9 * others)

    limits: dict[str, Any] = {"max_batch": 4, "max_queue": 30, "max_wait_s": 0.0, "timeout_s": 30.0} | changes
    arrived = poisson(load * 4 / service_s(4, 0), 10)
    simulated = sorted(simulate(arrived, service_s, **limits))
    limits["max_wait_ms"] = 1000 * limits.pop("max_wait_s")
    real = served_by_the_batcher(arrived, service_s, monkeypatch, **limits)
    assert [a.status for a in simulated] == [a.status for a in real]
    assert {a.status for a in real} == seen
    assert [a.seconds for a in simulated] == pytest.approx([a.seconds for a in real])


def test_what_is_fitted_makes_full_batches_come_out_at_saturation() -> None:
    times = {(batch, others): [0.01 * batch * (1 + others)] for batch in range(1, 9) for others in (0, 1)}
    beside_s = fitted(times, 50)
    assert beside_s == pytest.approx(0.01)
    service_s = model_of(times, beside_s, seed=0)
    found = outcome(simulate(poisson(500, 20), service_s, max_batch=8, in_flight=2), seconds=20)
    assert found.per_s == pytest.approx(50, rel=0.02)


def test_nothing_answered_has_no_latency() -> None:
    found = outcome([Answer(0, BUSY, 0)], seconds=1)
    assert found.refused == 1
    assert math.isnan(found.p99_ms)
