import io

import numpy as np
import pytest
from PIL import Image

from app.model.frame import Box
from app.model.labels import NOTICE, OFF, judge
from app.model.overlay import Method, Overlay, Style, aim, evidence, render
from tests.conftest import make_manifest
from training.drawn import draw_lesion

CAM = np.full((14, 14), -1, dtype=np.float32)
CAM[3, 10] = 2.5


def draw(style: Style = "overlay", alpha: float = 1.0, cam: np.ndarray = CAM) -> tuple[Overlay, np.ndarray]:
    overlay = render(cam, draw_lesion(0, 1, size=(280, 140)), style=style, alpha=alpha, description="why")
    return overlay, np.asarray(Image.open(io.BytesIO(overlay.png))).astype(int)


def test_colour_lies_where_the_evidence_is_and_skin_stays_elsewhere() -> None:
    _, picture = draw()
    image = np.asarray(draw_lesion(0, 1, size=(280, 140))).astype(int)
    change = np.abs(picture - image).sum(axis=2)
    peak_row, peak_column = np.unravel_index(change.argmax(), change.shape)
    assert abs(peak_row - 3.5 * 10) < 15
    assert abs(peak_column - 10.5 * 20) < 30
    assert change[70:, :100].max() == 0


def test_alpha_zero_is_the_image() -> None:
    _, picture = draw(alpha=0)
    assert np.array_equal(picture, np.asarray(draw_lesion(0, 1, size=(280, 140))))


@pytest.mark.parametrize(
    ("style", "size"), [("overlay", (280, 140)), ("heatmap", (280, 140)), ("side-by-side", (560, 140))]
)
def test_each_style_has_its_size(style: Style, size: tuple[int, int]) -> None:
    overlay, _ = draw(style)
    assert Image.open(io.BytesIO(overlay.png)).size == size


def test_the_raw_peak_travels_with_the_picture() -> None:
    weak, strong = draw(cam=CAM / 100)[0], draw()[0]
    assert weak.peak == pytest.approx(0.025)
    assert strong.peak == pytest.approx(2.5)
    assert not strong.empty


def test_a_map_without_evidence_is_empty_and_colours_nothing() -> None:
    overlay, picture = draw(cam=np.full((14, 14), -0.5, dtype=np.float32))
    assert overlay.empty
    assert overlay.peak == -0.5
    assert np.array_equal(picture, np.asarray(draw_lesion(0, 1, size=(280, 140))))


def test_evidence_is_the_positive_part_scaled_by_its_peak() -> None:
    scaled = evidence(np.array([[-3, 0], [1, 4]], dtype=np.float32))
    assert scaled.tolist() == [[0, 0], [0.25, 1]]


def test_the_png_carries_what_it_is_and_the_notice() -> None:
    text = Image.open(io.BytesIO(draw()[0].png)).info
    assert text["Description"] == "why"
    assert text["Disclaimer"] == NOTICE


@pytest.mark.parametrize(
    ("target", "method", "label", "description"),
    [
        ("predicted", "gradcam", "malignant", "Grad-CAM for malignant 0.500, asff-resnet50 1"),
        ("malignant", "occlusion", "malignant", "Occlusion for malignant 0.500, asff-resnet50 1"),
        ("benign", "integrated-gradients", "benign", "Integrated gradients for benign 0.500, asff-resnet50 1"),
    ],
)
def test_the_target_is_the_decision_or_the_class_that_was_named(
    target: str, method: Method, label: str, description: str
) -> None:
    manifest = make_manifest()
    judgement = judge(np.zeros(2, np.float32), manifest, "balanced", coverage=OFF)
    aimed = aim(target, method, judgement=judgement, manifest=manifest)
    assert (aimed.label, aimed.index, aimed.description) == (label, manifest.classes.index(label), description)


@pytest.mark.parametrize("lit", [Box(0, 0, 0.46, 1), Box(0.55, 0, 1, 1), Box(0, 0.4, 1, 0.45)])
def test_a_part_that_is_narrower_than_a_pixel_is_drawn_in_one(lit: Box) -> None:
    for size in ((1, 1024), (1024, 1)):
        overlay = render(CAM, Image.new("RGB", size), lit=lit, style="heatmap", alpha=1, description="why")
        assert Image.open(io.BytesIO(overlay.png)).size == size
