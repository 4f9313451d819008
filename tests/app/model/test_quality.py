"""The measures move with what they are named after, and with nothing else; what is wrong is said."""

import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from app.model.quality import LIMITS, Quality, assess, measure
from training.drawn import draw_lesion


def planes(picture: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


LESION = draw_lesion(1, 3)
GOOD = planes(LESION)


def test_a_good_picture_has_no_warning() -> None:
    assert assess(measure(GOOD)) == Quality((), ())


def cast(red: float, green: float, blue: float) -> np.ndarray:
    return np.asarray((GOOD * np.array([red, green, blue])[:, None, None]).clip(0, 255), dtype=np.uint8)


def black_frame() -> np.ndarray:
    framed = np.zeros_like(GOOD)
    framed[:, 40:-40, 40:-40] = GOOD[:, 40:-40, 40:-40]
    return framed


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (planes(LESION.filter(ImageFilter.GaussianBlur(6))), "blurred"),
        (np.random.default_rng(0).integers(0, 256, GOOD.shape, dtype=np.uint8), "grainy"),
        (cast(0.3, 0.3, 0.3), "too dark"),
        (cast(1.5, 1.5, 1.5), "too bright"),
        (np.full_like(GOOD, 255), "overexposed"),
        (cast(1, 0.5, 0.5), "a red cast"),
        (cast(0.5, 1, 1), "a cold cast"),
        (cast(0.7, 0.7, 1.2), "a blue cast"),
        (cast(1, 1, 0.3), "a yellow cast"),
        (black_frame(), "black"),
    ],
)
def test_what_is_wrong_is_said(pixels: np.ndarray, words: str) -> None:
    assert any(words in warning for warning in assess(measure(pixels)).warnings)


@pytest.mark.parametrize("value", [0, 255])
def test_a_picture_of_one_value_has_finite_measures(value: int) -> None:
    assert all(np.isfinite(list(asdict(measure(np.full((3, 224, 224), value, np.uint8))).values())))


def test_what_is_severe_was_worth_a_warning_before() -> None:
    for limit in LIMITS:
        if limit.severe is not None:
            assert limit.severe > limit.warn if limit.above else limit.severe < limit.warn
    for sigma in (2, 4, 8, 12):
        found = assess(measure(planes(LESION.filter(ImageFilter.GaussianBlur(sigma)))))
        assert set(found.spoilt) <= set(found.warnings)
    assert found.spoilt


def test_the_work_is_a_few_passes_over_small_arrays() -> None:
    measure(GOOD)
    tracemalloc.start()
    measure(GOOD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * GOOD[0].size  # bytes: ten float32 planes


@pytest.mark.parametrize(
    ("colour", "brightness", "saturation"),
    [("black", 0, 0), ("white", 1, 0), ("grey", 128 / 255, 0), ("red", 0.299, 1), ("#804040", 83.1 / 255, 0.5)],
)
def test_one_colour_is_as_bright_and_saturated_as_it_is_and_has_no_edge(
    colour: str, brightness: float, saturation: float
) -> None:
    found = measure(planes(Image.new("RGB", (224, 224), colour)))
    assert found.brightness == pytest.approx(brightness, abs=0.001)
    assert found.saturation == pytest.approx(saturation, abs=0.001)
    assert found.sharpness == pytest.approx(0, abs=1e-6)


def test_a_blur_is_seen_in_the_sharpness_alone() -> None:
    before, after = measure(planes(LESION)), measure(planes(LESION.filter(ImageFilter.GaussianBlur(2))))
    assert after.sharpness < 0.6 * before.sharpness
    assert after.brightness == pytest.approx(before.brightness, abs=0.02)
    assert after.saturation == pytest.approx(before.saturation, abs=0.05)


def test_a_darker_picture_is_less_bright_and_a_paler_one_less_saturated() -> None:
    before = measure(planes(LESION))
    assert measure(planes(ImageEnhance.Brightness(LESION).enhance(0.5))).brightness < 0.6 * before.brightness
    assert measure(planes(ImageEnhance.Color(LESION).enhance(0.5))).saturation < 0.7 * before.saturation


def test_a_checkerboard_has_the_variance_that_its_laplacian_has() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 2).astype(np.uint8)  # 0 and 2: each pixel is ±8 from its neighbours
    assert measure(np.stack([board] * 3)).sharpness == pytest.approx(64, rel=0.01)
