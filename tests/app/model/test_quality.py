"""The measures move with what they are named after, and with nothing else."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from app.model.quality import measure
from training.drawn import draw_lesion


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.fixture
def drawn() -> Image.Image:
    return draw_lesion(1, 3, size=(224, 224))


@pytest.mark.parametrize(
    ("colour", "brightness", "saturation"),
    [("black", 0, 0), ("white", 1, 0), ("grey", 128 / 255, 0), ("red", 0.299, 1), ("#804040", 83.6 / 255, 0.5)],
)
def test_one_colour_is_as_bright_and_saturated_as_it_is_and_has_no_edge(
    colour: str, brightness: float, saturation: float
) -> None:
    found = measure(pixels(Image.new("RGB", (224, 224), colour)))
    assert found.brightness == pytest.approx(brightness, abs=0.001)
    assert found.saturation == pytest.approx(saturation, abs=0.001)
    assert found.sharpness == pytest.approx(0, abs=1e-6)


def test_a_blur_is_seen_in_the_sharpness_alone(drawn: Image.Image) -> None:
    before, after = measure(pixels(drawn)), measure(pixels(drawn.filter(ImageFilter.GaussianBlur(2))))
    assert after.sharpness < before.sharpness / 3
    assert after.brightness == pytest.approx(before.brightness, abs=0.02)
    assert after.saturation == pytest.approx(before.saturation, abs=0.05)


def test_a_darker_picture_is_less_bright_and_a_paler_one_less_saturated(drawn: Image.Image) -> None:
    before = measure(pixels(drawn))
    assert measure(pixels(ImageEnhance.Brightness(drawn).enhance(0.5))).brightness < 0.6 * before.brightness
    assert measure(pixels(ImageEnhance.Color(drawn).enhance(0.5))).saturation < 0.7 * before.saturation


def test_a_checkerboard_has_the_variance_that_its_laplacian_has() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 2).astype(np.uint8)  # 0 and 2: each pixel is ±8 from its neighbours
    assert measure(np.stack([board] * 3)).sharpness == pytest.approx(64, rel=0.01)
