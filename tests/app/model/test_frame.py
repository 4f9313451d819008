"""A dark frame is found, cropped away and told of; what only looks like one is left alone."""

import io
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.main import create_app
from app.model import store
from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD
from app.model.frame import WHOLE, lit_part
from app.model.manifest import Preprocessing
from app.model.overlay import render
from app.model.preprocess import decode
from app.settings import Settings
from tests.conftest import JPEG, NAME, encode, framed, make_manifest
from training.drawn import draw_lesion

LESION = draw_lesion(1, 3, size=(400, 400))
TOLD = "a dark frame was cropped away"


def planes(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((224, 224)).convert("RGB")).transpose(2, 0, 1)


def test_of_a_disc_about_the_square_within_it_is_left() -> None:
    box = lit_part(planes(framed(LESION)))
    assert box is not None
    within = (1 - 2**-0.5) / 2  # of the side, beyond the square in the disc
    assert all(within - 0.08 < edge < within + 0.02 for edge in (box.left, box.top, 1 - box.right, 1 - box.bottom))
    left, top, right, bottom = (round(edge) for edge in box.of(224, 224))
    assert (planes(framed(LESION))[:, top:bottom, left:right].max(axis=0) < 30).mean() < 0.02


def test_bars_of_any_width_go_and_nothing_else() -> None:
    barred = Image.new("RGB", (400, 400))
    barred.paste(LESION.crop((0, 0, 300, 360)), (60, 0))
    box = lit_part(planes(barred))
    assert box is not None
    assert np.allclose(box, (60 / 400, 0, 360 / 400, 360 / 400), atol=0.01)


@pytest.mark.parametrize(
    "picture",
    [
        LESION,
        Image.new("RGB", (224, 224)),  # all dark
        Image.new("RGB", (224, 224), (20, 20, 20)),
        ImageOps.expand(LESION.resize((120, 120)), border=140),  # more frame than picture
        LESION.point(lambda value: value // 8),
    ],
    ids=["none", "black", "dark", "mostly frame", "underexposed"],
)
def test_without_a_frame_and_where_little_would_be_left_nothing_is_cropped(picture: Image.Image) -> None:
    assert lit_part(planes(picture)) is None
    seen = decode(encode(picture), crop_frame=True)
    assert seen.lit is None
    assert np.array_equal(seen.pixels, decode(encode(picture)).pixels)


def test_a_lesion_at_the_border_is_no_frame() -> None:
    spot = LESION.copy()
    spot.paste((20, 15, 15), (0, 150, 60, 250))
    assert lit_part(planes(spot)) is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_what_is_left_is_judged_and_the_preview_keeps_the_frame(mode: str, orientation: int) -> None:
    picture = framed(draw_lesion(1, 3, size=(640, 400))).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, exif=exif)
    picture = picture.convert("RGB")
    upright = picture if orientation == 1 else picture.rotate(-90 if orientation == 6 else 90, expand=True)
    kept, cropped = decode(data, preview_side=300), decode(data, crop_frame=True, preview_side=300)
    assert kept.lit is None
    assert cropped.lit is not None
    assert TOLD in cropped.warnings
    assert TOLD not in kept.warnings
    assert np.array_equal(np.asarray(cropped.preview), np.asarray(kept.preview))
    expected = upright.resize((224, 224), Image.Resampling.BILINEAR, box=cropped.lit.of(*upright.size))
    difference = np.abs(cropped.pixels.astype(int) - np.asarray(expected).transpose(2, 0, 1).astype(int))
    assert difference.mean() < 4  # the preview's scaling changes a little
    assert (kept.pixels.max(axis=0) < 30).mean() > 0.4
    assert (cropped.pixels.max(axis=0) < 30).mean() < 0.05


def test_the_map_is_drawn_over_the_part_that_was_judged() -> None:
    picture = framed(LESION)
    box = lit_part(planes(picture))
    assert box is not None
    cam = np.ones((14, 14), dtype=np.float32)
    overlay = render(cam, picture, lit=box, style="overlay", alpha=1, description="why")
    change = np.abs(np.asarray(Image.open(io.BytesIO(overlay.png))).astype(int) - np.asarray(picture)).sum(axis=2) > 30
    left, top, right, bottom = (round(edge) for edge in box.of(*picture.size))
    assert change[top:bottom, left:right].mean() > 0.99
    change[top:bottom, left:right] = False
    assert not change.any()


def test_a_version_says_whether_it_crops_and_the_service_obeys(tmp_path: Path, random_weights: bytes) -> None:
    data = encode(framed(LESION), "JPEG", quality=95)
    for crops in (False, True):
        root = tmp_path / str(crops)
        prepared = Preprocessing(
            size=64,
            resize="squash-bilinear",
            crop_frame=crops,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        store.publish(root, make_manifest(preprocessing=prepared), {store.WEIGHTS: random_weights})
        store.promote(root, NAME, "1")
        with TestClient(create_app(Settings(model_store=root))) as client:
            answer = client.post("/explain", content=data, headers=JPEG | {"Accept": "application/json"}).json()
        box = decode(data, size=64, crop_frame=crops).lit
        assert answer["seen"] == list(box or WHOLE)
        assert (TOLD in answer["image"]["warnings"]) == crops == (box is not None)
