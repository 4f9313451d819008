import numpy as np

from app.model.flips import flips, mean_cam, mean_logits


def test_the_first_of_four_different_images_is_the_image_itself() -> None:
    image = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    four = flips(image)
    assert np.array_equal(four[0], image)
    assert len({flipped.tobytes() for flipped in four}) == 4
    assert all(np.array_equal(np.sort(flipped, axis=None), np.sort(image, axis=None)) for flipped in four)


def test_maps_are_turned_back_before_they_are_averaged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 6), dtype=np.uint8)
    as_maps = [flipped.astype(np.float32) for flipped in flips(image)]  # a network whose map is its image
    assert np.array_equal(mean_cam(as_maps), image)


def test_logits_are_averaged() -> None:
    logits = [np.array([value, -value], dtype=np.float32) for value in (1, 2, 3, 6)]
    assert mean_logits(logits).tolist() == [3, -3]
