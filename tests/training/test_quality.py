import numpy as np
import pytest

from app.model.preprocess import decode
from app.model.quality import measure
from tests.conftest import encode, framed
from training.drawn import draw_lesion
from training.quality import KINDS, percentiles, row, spoil, unframed

LESION = np.ascontiguousarray(np.asarray(draw_lesion(1, 3)).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("kind", "measured", "grows"),
    [
        ("darker", "brightness", False),
        ("brighter", "brightness", True),
        ("few pixels", "sharpness", False),
        ("vignette", "dark", True),
        ("gaussian-noise", "sharpness", True),
    ],
)
def test_a_stronger_degradation_measures_worse(kind: str, measured: str, grows: bool) -> None:
    # Rounded: what is white already gets no brighter
    values = [round(getattr(measure(spoil(LESION, kind, strength=s, seed=0)), measured), 3) for s in (1, 3, 5)]
    assert values == sorted(values, reverse=not grows)
    assert values[0] != values[-1]


def test_every_kind_keeps_the_shape_and_spoils() -> None:
    for kind in KINDS:
        spoilt = spoil(LESION, kind, strength=5, seed=0)
        assert spoilt.shape == LESION.shape
        assert spoilt.dtype == np.uint8
        assert not np.array_equal(spoilt, LESION)


def test_a_group_of_one_class_has_an_accuracy_and_no_roc_auc() -> None:
    found = row("dark", np.array([1, 1, 1, 1]), np.array([0.9, 0.8, 0.1, 0.7]), 0.5)
    assert (found["images"], found["accuracy"], found["roc_auc"]) == ("4", "0.7500", "")
    assert row("none", np.array([], dtype=np.int64), np.array([]), 0.5)["accuracy"] == ""


def test_percentiles_are_of_every_measure() -> None:
    table = {line["measure"]: line for line in percentiles(np.stack([LESION, 255 - LESION]))}
    assert float(table["brightness"]["p0"]) < float(table["brightness"]["p100"])


def test_a_round_field_is_cropped_as_serving_crops_it() -> None:
    picture = framed(draw_lesion(1, 3))
    pixels = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(unframed(pixels), decode(encode(picture), crop_frame=True).pixels)
    clear = np.asarray(draw_lesion(1, 3)).transpose(2, 0, 1)
    assert unframed(clear) is clear


def test_versions_of_one_image_are_not_counted_as_many_images() -> None:
    labels, positive = np.array([0, 1, 1, 0]), np.array([0.9, 0.9, 0.1, 0.1])
    alone = row("x", labels, positive, 0.5)
    four = row("x", np.tile(labels, 4), np.tile(positive, 4), 0.5, of=np.tile(np.arange(4), 4))
    assert alone["error"] == four["error"] == "0.2500"
    assert row("x", np.tile(labels, 4), np.tile(positive, 4), 0.5)["error"] == "0.1250"
