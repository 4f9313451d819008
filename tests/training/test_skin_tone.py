"""Skin tone: known colours give their angle, skin is found beside lesion, tube and hairs, and the table is right."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training.artefacts import draw_hairs, lay_over
from training.skin_tone import (
    CATEGORIES,
    Predictions,
    category,
    lab,
    main,
    read_predictions,
    skin_mask,
    statement,
    table,
    typology_angle,
)

Pixels = NDArray[np.uint8]
# sRGB of skin from very light to dark, one a category
SKINS = {
    "very light": (245, 222, 206),
    "light": (218, 178, 145),
    "intermediate": (205, 160, 128),
    "tan": (184, 138, 104),
    "brown": (128, 90, 66),
    "dark": (74, 48, 36),
}
SIDE = 224


def patch(colour: tuple[int, int, int], side: int = SIDE) -> Pixels:
    return np.broadcast_to(np.array(colour, dtype=np.uint8)[:, None, None], (3, side, side)).copy()


def disc(radius: float, *, side: int = SIDE, at: tuple[float, float] = (0.5, 0.5)) -> NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side] / side
    return np.asarray(np.hypot(y - at[0], x - at[1]) < radius)


def grainy(image: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 3, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def photograph(colour: tuple[int, int, int]) -> Pixels:
    """Skin with a lesion of two thirds of its brightness, and grain."""
    image = patch(colour)
    spot = disc(0.28, at=(0.45, 0.52))
    image[:, spot] = image[:, spot] * 0.66
    return grainy(image)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [  # published CIELAB values of sRGB under D65
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
    ],
)
def test_lab_of_known_colours(colour: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    assert lab(patch(colour, 2))[:, 1, 1] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("name", "colour"), SKINS.items())
def test_a_plain_patch_has_the_angle_of_its_colour(name: str, colour: tuple[int, int, int]) -> None:
    lightness, _, yellow = (float(v) for v in lab(patch(colour, 1)).ravel())
    angle = typology_angle(patch(colour))
    assert np.tan(np.radians(angle)) == pytest.approx((lightness - 50) / yellow, abs=1e-3)
    assert category(angle) == name


@pytest.mark.parametrize("colour", SKINS.values())
def test_a_lesion_does_not_change_the_angle_of_the_skin(colour: tuple[int, int, int]) -> None:
    image = photograph(colour)
    assert typology_angle(image) == pytest.approx(typology_angle(patch(colour)), abs=2.5)
    assert not (skin_mask(image) & disc(0.26, at=(0.45, 0.52))).any()


def test_a_lesion_that_reaches_the_border_is_no_skin() -> None:
    image = patch(SKINS["light"])
    image[:, disc(0.45, at=(0.3, 0.35))] = np.array([[110], [70], [52]])
    skin = skin_mask(grainy(image))
    assert not (skin & disc(0.43, at=(0.3, 0.35))).any()
    assert typology_angle(grainy(image)) == pytest.approx(typology_angle(patch(SKINS["light"])), abs=2.5)


@pytest.mark.parametrize("name", ["very light", "light", "tan", "brown", "dark"])
@pytest.mark.parametrize("radius", [0.52, 0.4])
def test_the_black_tube_around_a_round_field_is_no_skin(name: str, radius: float) -> None:
    image = photograph(SKINS[name])
    image[:, ~disc(radius)] = 6
    assert not (skin_mask(image) & ~disc(radius)).any()
    assert typology_angle(image) == pytest.approx(typology_angle(patch(SKINS[name])), abs=3)


def test_hairs_and_glare_are_no_skin() -> None:
    clean = photograph(SKINS["light"])
    coverage = draw_hairs(SIDE, count=15, rng=np.random.default_rng(1))
    image = lay_over(clean.astype(np.float32), coverage, colour=(30.0, 22.0, 18.0)).astype(np.uint8)
    image[:, :20, 60:120] = 255
    skin = skin_mask(image)
    assert not (skin & (coverage > 0.5)).any()
    assert not skin[:20, 60:120].any()
    assert skin.sum() > 0.2 * SIDE**2
    assert typology_angle(image) == pytest.approx(typology_angle(patch(SKINS["light"])), abs=2.5)


def test_bluish_light_skin_stays_light() -> None:
    assert typology_angle(patch((225, 215, 235))) > 90  # the plain ratio would say −70


def test_a_picture_without_skin_has_no_angle() -> None:
    assert np.isnan(typology_angle(patch((3, 3, 3))))
    assert np.isnan(typology_angle(patch((255, 255, 255))))
    assert category(float("nan")) == "unknown"


def test_categories_begin_above_their_limits() -> None:
    assert [category(angle) for angle in (55.1, 55, 41, 28, 10, -30, -120)] == [*CATEGORIES, "dark"]


def predictions() -> tuple[Predictions, NDArray[np.float64]]:
    """Six light images of one source, three of them malignant and one of these missed; two dark ones of another."""
    return Predictions(
        names=[f"benign/{i}.jpg" for i in range(8)],
        sources=["here"] * 6 + ["there"] * 2,
        labels=np.array([0, 0, 0, 1, 1, 1, 1, 0]),
        probabilities=np.array([0.1, 0.2, 0.6, 0.3, 0.8, 0.9, 0.4, 0.1]),
        positive=np.array([False, False, True, False, True, True, False, False]),
    ), np.array([50.0] * 6 + [-40.0, 0.0])


def test_the_table_has_a_row_a_source_and_category() -> None:
    rows = {(row["source"], row["category"]): row for row in table(*predictions())}
    assert len(rows) == 2 * (len(CATEGORIES) + 2)
    light = rows["here", "light"]
    assert (light["images"], light["malignant"]) == ("6", "3")
    assert light["sensitivity"] == light["specificity"] == light["accuracy"] == "0.6667"
    # Wilson's interval of 2 out of 3, by its formula
    centre, reach = (2 / 3 + 1.96**2 / 6) / (1 + 1.96**2 / 3), 1.96 * (2 / 27 + 1.96**2 / 36) ** 0.5 / (1 + 1.96**2 / 3)
    assert float(light["sensitivity_low"]) == pytest.approx(centre - reach, abs=1e-3)
    assert float(light["sensitivity_high"]) == pytest.approx(centre + reach, abs=1e-3)
    assert light["roc_auc"] == f"{8 / 9:.4f}"
    assert light["roc_auc_low"] == ""  # three of a class say nothing about an interval
    assert rows["here", "all"] == light | {"category": "all"}
    dark = rows["there", "dark"]
    assert (dark["images"], dark["sensitivity"], dark["specificity"], dark["roc_auc"]) == ("1", "0.0000", "", "")
    empty = rows["here", "dark"]
    assert (empty["images"], empty["accuracy"]) == ("0", "")


def test_an_interval_of_roc_auc_needs_five_of_a_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    scores = rng.normal(labels, 1)
    many = Predictions([f"benign/{i}.jpg" for i in range(40)], ["here"] * 40, labels, scores, scores > 0.5)
    row = table(many, np.full(40, 60.0))[0]
    assert row["category"] == "very light"
    assert 0.4 < float(row["roc_auc_low"]) < float(row["roc_auc"]) < float(row["roc_auc_high"]) <= 1


def test_the_statement_counts_brown_and_dark_once() -> None:
    rows = table(*predictions())
    assert statement(rows).startswith("Of 8 images, 2 (25.0%) have skin that reads as brown or dark, 1 of them malig")
    assert "nearly absent" not in statement(rows)
    light, _ = predictions()
    assert "Of 8 images, 0 (0.0%)" in statement(table(light, np.full(8, 60.0)))
    assert "nearly absent" in statement(table(light, np.full(8, 60.0)))


HEADERS = {
    "compare": "name,label,logit,probability,positive",
    "report": "name,label,source,fold,logit_benign,logit_malignant,probability_benign,probability_malignant,decided",
}


@pytest.mark.parametrize("form", HEADERS)
def test_the_command_reads_both_forms_of_predictions(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    images = {"benign/1.jpg": "light", "malignant/2.jpg": "brown", "isic2019/malignant/3.jpg": "very light"}
    lines = []
    for name, skin in images.items():
        source = "isic2019" if name.startswith("isic2019/") else "isic2020/train"
        path = tmp_path / (name if source == "isic2019" else f"{source}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(photograph(SKINS[skin]).transpose(1, 2, 0)).save(buffer, "JPEG", quality=95)
        path.write_bytes(buffer.getvalue())
        label = int("malignant" in name)
        tail = f"0.5,0.7,{label}" if form == "compare" else f"{source},0,-0.5,0.5,0.3,0.7,{label}"
        lines.append(f"{name},{label},{tail}")
    (tmp_path / "predictions.csv").write_text("\n".join([HEADERS[form], *lines]) + "\n")
    found = read_predictions(tmp_path / "predictions.csv")
    assert found.sources == ["isic2020/train", "isic2020/train", "isic2019"]
    assert found.probabilities.tolist() == [0.7] * 3
    assert found.positive.tolist() == [False, True, True]

    main(["--predictions", str(tmp_path / "predictions.csv"), "--evidence", str(tmp_path / "evidence")])
    with (tmp_path / "evidence" / "skin_tone.csv").open(newline="") as file:
        rows = {(r["source"], r["category"]): r["images"] for r in csv.DictReader(file)}
    filled = {key for key, count in rows.items() if count != "0" and key[1] != "all"}
    assert filled == {("isic2020/train", "light"), ("isic2020/train", "brown"), ("isic2019", "very light")}
    assert "Of 3 images, 1 (33.3%) have skin that reads as brown or dark" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("name,label,probability\nbenign/1.jpg,0,0.5\n", "lacks one of the columns"),
        ("name,label,probability,positive\n", "has no rows"),
        ("name,label,probability,positive\nbenign/1.jpg,2,0.5,1\n", "labels other than 0 and 1"),
        ("name,label,probability,positive\nbenign/1.jpg,0,0.5,1\n", "set DERMLENS_DATA_DIR"),
    ],
)
def test_predictions_that_do_not_serve_are_refused(
    text: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    path = tmp_path / "predictions.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"training.skin_tone: .*{reason}"):
        main(["--predictions", str(path), "--evidence", str(tmp_path)])
