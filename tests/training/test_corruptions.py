"""Corruptions: bytes in, bytes out, the same for the same seed, and worse with every strength."""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from training.corruptions import KINDS, LEVELS, STRENGTHS, Pixels, corrupt
from training.drawn import draw_lesion


def lesion(seed: int, *, size: tuple[int, int] = (224, 224)) -> Pixels:
    """A drawn lesion with the grain of a photograph, without which there is little to blur."""
    drawn = np.asarray(draw_lesion(seed % 2, seed, size=size)).transpose(2, 0, 1)
    return (drawn + np.random.default_rng(seed).normal(0, 6, drawn.shape)).clip(0, 255).astype(np.uint8)


def grey(level: int = 120, side: int = 64) -> Pixels:
    return np.full((3, side, side), level, dtype=np.uint8)


def distance(first: Pixels, second: Pixels) -> float:
    return float(np.abs(first.astype(np.float64) - second).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_strength_is_further_from_the_image_than_the_one_below(kind: str) -> None:
    images = [lesion(seed) for seed in range(4)]
    away = [
        np.mean([distance(corrupt(x, kind, strength=s, seed=i), x) for i, x in enumerate(images)]) for s in STRENGTHS
    ]
    assert away[0] > 0.5
    assert all(later > 1.03 * earlier for earlier, later in pairwise(away))


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_depends_on_its_arguments_alone(kind: str) -> None:
    image = lesion(1, size=(120, 90))
    before = image.copy()
    out = corrupt(image, kind, strength=3, seed=5)
    assert out.dtype == np.uint8
    assert out.shape == image.shape == (3, 90, 120)
    assert np.array_equal(image, before)
    assert np.array_equal(out, corrupt(image, kind, strength=3, seed=5))
    drawn_from_seed = kind not in ("blur", "jpeg")
    others = [corrupt(image, kind, strength=3, seed=seed) for seed in range(6)]
    assert any(not np.array_equal(out, other) for other in others) == drawn_from_seed


@pytest.mark.parametrize(("kind", "strength"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_what_does_not_exist_is_refused(kind: str, strength: int) -> None:
    with pytest.raises(ValueError, match=f"no corruption {kind} of strength {strength}"):
        corrupt(grey(), kind, strength=strength, seed=0)


def test_noise_has_the_deviation_of_the_table() -> None:
    for strength in (1, 2, 3):  # little of these is clipped
        out = corrupt(grey(side=224), "gaussian-noise", strength=strength, seed=0).astype(np.float64)
        assert out.std() == pytest.approx(LEVELS["gaussian-noise"][strength - 1], rel=0.02)
        assert out.mean() == pytest.approx(120, abs=0.5)


def test_brightness_goes_both_ways_by_the_factor_of_the_table() -> None:
    found = {int(corrupt(grey(), "brightness", strength=5, seed=seed)[0, 0, 0]) for seed in range(20)}
    assert found == {round(120 * 1.75), round(120 / 1.75)}


def test_a_colour_cast_changes_the_hue_and_not_the_grey() -> None:
    reddest = set()
    for seed in range(20):
        channels = corrupt(grey(), "colour-cast", strength=4, seed=seed).astype(np.float64).mean(axis=(1, 2))
        assert channels.mean() == pytest.approx(120, abs=1)
        assert np.abs(channels - 120).max() == pytest.approx(120 * LEVELS["colour-cast"][3], abs=1)
        reddest.add(int(channels.argmax()))
    assert reddest == {0, 1, 2}


def test_jpeg_is_what_a_camera_writes_at_that_quality() -> None:
    image = lesion(0)
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=6, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1)
    assert np.array_equal(corrupt(image, "jpeg", strength=5, seed=0), expected)


@pytest.mark.parametrize("kind", ["hair", "ruler"])
def test_what_lies_over_an_image_is_dark_and_leaves_the_rest_alone(kind: str) -> None:
    weak, strong = (corrupt(grey(200, 224), kind, strength=s, seed=3) for s in (1, 5))
    assert 0.003 < (weak < 190).mean() < (strong < 190).mean() < 0.7
    assert (strong == 200).mean() > 0.3
    assert (strong[weak < 100] < 130).all()  # the stronger one begins with what the weaker one has


def test_rotation_turns_about_the_middle_and_reflects_at_the_border() -> None:
    image = grey(150, 101)
    image[:, 50, 60:90] = 0  # a ray to the right
    angles = set()
    for seed in range(12):
        out = corrupt(image, "rotation", strength=5, seed=seed)
        y, x = np.nonzero(out[0] < 75)
        angles.add(round(float(np.degrees(np.arctan2(50 - y.mean(), x.mean() - 50)))))
    assert angles == {45, -45}
    assert corrupt(grey(150, 101), "rotation", strength=4, seed=0).min() == 150  # no black corners


def test_no_rotation_is_a_quarter_turn() -> None:
    assert all(angle % 90 for angle in LEVELS["rotation"])
