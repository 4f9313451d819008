"""How batches meet a device that runs a few fixed sizes, a few at a time. Plain code: no device, no torch."""

import queue
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # batch sizes that CUDA graphs are captured for

T = TypeVar("T")


def bucket_of(images: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds so many images.

    Raises:
        ValueError: none does.
    """
    for size in buckets:
        if images <= size:
            return size
    raise ValueError(f"{images} images are over the largest batch of {max(buckets)}")


def parts(images: int, largest: int) -> Iterator[slice]:
    """Runs of at most `largest` images, in order."""
    for start in range(0, images, largest):
        yield slice(start, min(start + largest, images))


def stage(images: NDArray[np.uint8], buffer: NDArray[np.uint8], buckets: Sequence[int] = BUCKETS) -> int:
    """Copy images into the head of a staging buffer and blank the padding behind them; returns the bucket."""
    size = bucket_of(len(images), buckets)
    buffer[: len(images)] = images
    buffer[len(images) : size] = 0  # never another patient's pixels
    return size


class Slots(Generic[T]):
    """What one batch in flight needs for itself; a batch takes one, or waits for one to come free."""

    def __init__(self, items: Iterable[T]) -> None:
        self._free: queue.SimpleQueue[T] = queue.SimpleQueue()
        for item in items:
            self._free.put(item)

    @property
    def free(self) -> int:
        return self._free.qsize()

    @contextmanager
    def take(self) -> Iterator[T]:
        item = self._free.get()
        try:
            yield item
        finally:
            self._free.put(item)
