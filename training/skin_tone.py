"""Results by skin tone: the individual typology angle of the skin around each lesion, and a table by its categories.

python -m training.skin_tone --predictions held_out_predictions.csv

ITA = arctan((L* − 50) / b*) · 180/π (Chardonnay et al., International Journal of Cosmetic Science 13, 1991), in the six
categories of Del Bino and Bernerd (British Journal of Dermatology 169, 2013). It was defined for a colorimeter on clean
skin. Here it is read off a dermoscopic photograph: lamp, polarisation and white balance are unknown, the vessels are
pressed empty or the skin is red, sun-tanned or inked. One image may well be a category off; a shift of a whole source
cannot be told from another lamp. It says which tones a set of images can hold at all, nothing about one person.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import binomtest
from tqdm import tqdm

from app.model.preprocess import ImageError, decode
from training.config import data_dir
from training.evaluate import Floats, Labels
from training.lesion_mask import otsu
from training.statistics import auc_with_interval

Mask = NDArray[np.bool_]

# Least angle of each category, degrees
CATEGORIES = {"very light": 55.0, "light": 41.0, "intermediate": 28.0, "tan": 10.0, "brown": -30.0, "dark": -90.0}
UNKNOWN = "unknown"  # no skin to be seen
EVERY = "all"
DARK = ("brown", "dark")
HOME = "isic2020/train"  # where `training.data` gives names without a folder

BORDER = 0.75  # skin is sought outside the ellipse of this share of the lit field's width and height
BLACK = 12.0  # L*: unlit; the darkest skin measured by colorimeter lies above 20
GLARE = 97.0  # L*: a reflection, white paper
CONTRAST = 8.0  # L*: two clusters nearer than this are one skin
HAIR = 6.0  # L* by which a hair is darker than a closing over it
LEAST_SKIN = 0.01  # share of the picture

SRGB_TO_XYZ = np.array(  # IEC 61966-2-1, divided by the white point D65: white becomes (1, 1, 1)
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
SRGB_TO_XYZ /= SRGB_TO_XYZ.sum(axis=1, keepdims=True)


def lab(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8[3,H,W] sRGB -> float32[3,H,W] CIELAB L*, a*, b* under D65 (CIE 15)."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)[image]
    xyz = np.tensordot(SRGB_TO_XYZ, linear, axes=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)]).astype(np.float32)


def skin_mask(image: NDArray[np.uint8]) -> Mask:
    """uint8[3,H,W] -> bool[H,W]: skin near the border of the lit field, without tube, glare, hairs and lesion.

    The tube around a round field of view is black; what is dark and thin is hair (Lee et al. 1997: a grey closing
    lifts it); of the two clusters of L* that are left (Otsu 1979) the darker one is lesion, where two can be told
    apart. The middle is left out, since a pale part of a lesion looks like skin.
    """
    lightness = lab(image)[0]
    side = min(lightness.shape)
    margin = max(1, side // 40)  # pixels: a tube's edge and a hair's are soft
    black = ndimage.binary_opening(lightness < BLACK, iterations=margin)
    lit = ~ndimage.binary_dilation(black, iterations=3 * margin)
    closed = ndimage.grey_closing(lightness, size=2 * margin + 1)
    hair = ndimage.binary_dilation(closed - lightness > HAIR, iterations=max(1, margin // 3))
    clear = lit & ~hair & (lightness > BLACK) & (lightness < GLARE)
    skin = clear & _border(lit)
    values = lightness[clear]
    if values.size and np.ptp(values) > CONTRAST:
        threshold = otsu(values)
        dark, light = values[values < threshold], values[values >= threshold]
        if light.mean() - dark.mean() > CONTRAST:
            skin &= lightness >= threshold
    return np.asarray(skin)


def _border(lit: Mask) -> Mask:
    """Outside the middle ellipse of the box around bool[H,W]."""
    radius = np.zeros(lit.shape)
    for axis, length in enumerate(lit.shape):
        along = np.flatnonzero(lit.any(axis=1 - axis))
        if along.size:
            first, last = along[0], along[-1]
            place = (2 * np.arange(length) - first - last) / max(last - first, 1)  # −1..1 over the box
            radius += np.expand_dims(place**2, 1 - axis)
    return np.asarray(np.sqrt(radius) > BORDER)


def typology_angle(image: NDArray[np.uint8]) -> float:
    """ITA in degrees of the median L* and b* of the skin in uint8[3,H,W]; NaN where no skin is seen.

    By atan2, which differs from the arctangent of the ratio for bluish skin (b* < 0) alone: there the ratio changes
    sign and would call the lightest skin the darkest.
    """
    skin = skin_mask(image)
    if skin.mean() < LEAST_SKIN:
        return float("nan")
    lightness, _, yellow = np.median(lab(image)[:, skin], axis=1)
    return float(np.degrees(np.arctan2(lightness - 50, yellow)))


def category(angle: float) -> str:
    """Name of an ITA in degrees."""
    if np.isnan(angle):
        return UNKNOWN
    return next((name for name, least in CATEGORIES.items() if angle > least), "dark")


@dataclass(frozen=True)
class Predictions:
    """What of a CSV of predictions matters here."""

    names: list[str]
    sources: list[str]  # folder of the data, for each image
    labels: Labels  # [N], 0 or 1
    probabilities: Floats  # [N], of class 1
    positive: NDArray[np.bool_]  # [N], decisions


def read_predictions(path: Path) -> Predictions:
    """The CSV of `training.compare` or of a version's report; columns beyond those needed do not matter.

    An image without a source lies in the folder that its name starts with, else in isic2020/train.

    Raises:
        ValueError: there is no such file, or a column is missing; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    probability = [c for c in columns if c.startswith("probability")]  # one, or one a class with the last the positive
    decision = [c for c in columns if c in ("positive", "decided")]
    if not {"name", "label"} <= set(columns) or not probability or not decision:
        raise ValueError(f"{path} lacks one of the columns name, label, probability, positive, or has no rows")
    if any(row["label"] not in ("0", "1") for row in rows):
        raise ValueError(f"{path} has labels other than 0 and 1: sensitivity by skin tone is of two classes")
    return Predictions(
        names=[row["name"] for row in rows],
        sources=[row.get("source") or _folder(row["name"]) or HOME for row in rows],
        labels=np.array([int(row["label"]) for row in rows]),
        probabilities=np.array([float(row[probability[-1]]) for row in rows]),
        positive=np.array([row[decision[0]] in ("1", "True", "true") for row in rows]),
    )


def angles(predictions: Predictions) -> Floats:
    """ITA [N] in degrees of the images under DERMLENS_DATA_DIR.

    Raises:
        ValueError: an image is missing or does not decode.
    """
    found = []
    images = list(zip(predictions.names, predictions.sources, strict=True))
    for name, source in tqdm(images, desc="skin", unit="img", disable=None):
        path = data_dir() / (name if name.startswith(f"{source}/") else f"{source}/{name}")
        try:
            found.append(typology_angle(decode(path.read_bytes()).pixels))
        except (OSError, ImageError) as error:
            raise ValueError(f"{path}: {error}: set DERMLENS_DATA_DIR (see docs/training.md)") from None
    return np.array(found)


def _folder(name: str) -> str:
    """`isic2019` of `isic2019/benign/1.jpg`, nothing of `benign/1.jpg`."""
    return "/".join(name.split("/")[:-2])


def table(predictions: Predictions, found: Floats) -> list[dict[str, str]]:
    """A row for each source and category of ITA [N], as skin_tone.csv holds them; blank where undefined.

    Shares have Wilson's 95% interval, ROC-AUC a bootstrap interval where both classes have at least five images.
    """
    categories = np.array([category(angle) for angle in found])
    sources = np.array(predictions.sources)
    return [
        {"source": source, "category": name} | _figures(predictions, mine)
        for source in dict.fromkeys(predictions.sources)
        for name in (*CATEGORIES, UNKNOWN, EVERY)
        for mine in [np.flatnonzero((sources == source) & ((categories == name) | (name == EVERY)))]
    ]


def _figures(predictions: Predictions, mine: NDArray[np.int64]) -> dict[str, str]:
    labels, positive = predictions.labels[mine], predictions.positive[mine]
    right = positive == (labels == 1)
    row = {"images": str(len(mine)), "malignant": str(int(labels.sum()))}
    for name, members in (("sensitivity", labels == 1), ("specificity", labels == 0), ("accuracy", labels >= 0)):
        row |= _cells(name, _share(right[members]))
    return row | _cells("roc_auc", auc_with_interval(labels, predictions.probabilities[mine]))


def _share(right: NDArray[np.bool_]) -> list[float]:
    if not len(right):
        return []
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [float(right.mean()), float(interval.low), float(interval.high)]


def _cells(name: str, numbers: Sequence[float]) -> dict[str, str]:
    cells = [f"{number:.4f}" for number in numbers] + [""] * (3 - len(numbers))
    return dict(zip((name, f"{name}_low", f"{name}_high"), cells, strict=True))


def statement(rows: Sequence[Mapping[str, str]]) -> str:
    """How many images of skin_tone.csv may be of brown or dark skin, in plain words."""

    def count(column: str, *categories: str) -> int:
        return sum(int(row[column]) for row in rows if row["category"] in categories)

    images, dark, malignant = count("images", EVERY), count("images", *DARK), count("malignant", *DARK)
    share = dark / max(images, 1)
    verdict = (
        "Dark skin is nearly absent: nothing here tells how good the answers are on it."
        if share < 0.05
        else "Read their rows before trusting an answer on dark skin."
    )
    return (
        f"Of {images} images, {dark} ({100 * share:.1f}%) have skin that reads as brown or dark, {malignant} of them "
        "malignant. The light is unknown: light skin in a dim photograph reads as brown too, dark skin in a bright one "
        f"does not. {verdict}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.skin_tone", description=__doc__.splitlines()[0])
    parser.add_argument("--predictions", type=Path, required=True, help="CSV of a version's report or of compare")
    parser.add_argument("--evidence", type=Path, default=Path("runs/evidence"), help="folder of the results")
    options = parser.parse_args(arguments)
    try:
        predictions = read_predictions(options.predictions)
        rows = table(predictions, angles(predictions))
    except ValueError as error:
        sys.exit(f"training.skin_tone: {error}")
    options.evidence.mkdir(parents=True, exist_ok=True)
    with (options.evidence / "skin_tone.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'source':16} {'category':13} {'images':>6} {'malignant':>9}  sensitivity  specificity  accuracy  ROC-AUC")
    for row in rows:
        sensitivity, specificity, accuracy, auc = (
            row[name] or "-" for name in ("sensitivity", "specificity", "accuracy", "roc_auc")
        )
        print(
            f"{row['source']:16} {row['category']:13} {row['images']:>6} {row['malignant']:>9}  {sensitivity:>11}  "
            f"{specificity:>11}  {accuracy:>8}  {auc:>7}"
        )
    print(f"{statement(rows)} {options.evidence / 'skin_tone.csv'}")


if __name__ == "__main__":
    main()
