import threading

import numpy as np
import pytest

from app.engines.buckets import BUCKETS, Slots, bucket_of, parts, stage


@pytest.mark.parametrize("images", range(1, 65))
def test_the_bucket_is_the_smallest_that_holds_the_batch(images: int) -> None:
    bucket = bucket_of(images)
    assert bucket in BUCKETS
    assert bucket // 2 < images <= bucket


def test_more_images_than_the_largest_bucket_are_refused_and_can_be_parted() -> None:
    with pytest.raises(ValueError, match="65 images are over the largest batch of 64"):
        bucket_of(65)
    assert [(p.start, p.stop) for p in parts(150, 64)] == [(0, 64), (64, 128), (128, 150)]
    assert [(p.start, p.stop) for p in parts(64, 64)] == [(0, 64)]


def test_staging_copies_the_images_and_blanks_the_padding_alone() -> None:
    buffer = np.full((64, 3, 2, 2), 9, dtype=np.uint8)  # pixels of an earlier batch
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 3, 2, 2)
    assert stage(images, buffer) == 8
    assert np.array_equal(buffer[:5], images)
    assert not buffer[5:8].any()
    assert (buffer[8:] == 9).all()


def test_a_slot_belongs_to_one_batch_at_a_time_and_comes_back_after_an_error() -> None:
    slots = Slots(["a", "b"])
    with slots.take() as first, slots.take() as second:
        assert {first, second} == {"a", "b"}
        third: list[str] = []

        def wait() -> None:
            with slots.take() as slot:
                third.append(slot)

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.05)
        assert not third
    waiting.join(5)
    assert third
    with pytest.raises(RuntimeError), slots.take():
        raise RuntimeError
    with slots.take(), slots.take():
        pass
