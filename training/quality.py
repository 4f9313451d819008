"""What spoils an answer: the limits of `app/model/quality.py`, from training images, and accuracy beyond them.

python -m training.quality --version model_store/asff-resnet50/7 --out runs/evidence

Held-out images are spoilt in five strengths; each is judged by the version, and its accuracy is set against what the
quality gate says of it. Percentiles are of the training images, so that a warning says "unlike what was trained on".
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from app.model import store
from app.model.labels import calibrate
from app.model.openvino_graph import build_graph
from app.model.preprocess import shrink
from app.model.quality import LIMITS, assess, measure
from training.config import Config
from training.corruptions import STRENGTHS, corrupt
from training.data import Dataset, load_dataset
from training.published import load_trained
from training.tables import write_csv

BATCH = 16
IMAGES = 200  # held-out ones that are spoilt
PERCENTILES = (0, 0.5, 1, 50, 99, 99.5, 100)
FROM_CORRUPTIONS = ("gaussian-noise", "blur", "jpeg", "colour-cast", "hair", "ruler")
# One number a strength: factor of light, side in pixels before enlarging, share of the side left in a round field
DARKER = (0.7, 0.5, 0.35, 0.22, 0.12)
BRIGHTER = (1.3, 1.7, 2.2, 3.0, 4.5)
SIDES = (112, 64, 40, 28, 18)
FIELDS = (1.1, 0.95, 0.8, 0.65, 0.5)
KINDS = (*FROM_CORRUPTIONS, "darker", "brighter", "few pixels", "vignette")

Pixels = NDArray[np.uint8]
Judge = Callable[[Pixels], NDArray[np.float64]]  # images -> probability of the last class


def spoil(image: Pixels, kind: str, *, strength: int, seed: int) -> Pixels:
    """A spoilt copy of uint8[3,H,W]; strengths 1 to 5."""
    if kind in FROM_CORRUPTIONS:
        return corrupt(image, kind, strength=strength, seed=seed)
    level = strength - 1
    if kind in ("darker", "brighter"):
        return (image * (DARKER if kind == "darker" else BRIGHTER)[level]).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    width, height = picture.size
    if kind == "few pixels":
        small = picture.resize((SIDES[level], SIDES[level]), Image.Resampling.BILINEAR)
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
    else:  # vignette
        field = Image.new("L", (width, height), 0)
        across, down = (FIELDS[level] * side / 2 for side in (width, height))
        box = (width / 2 - across, height / 2 - down, width / 2 + across, height / 2 + down)
        ImageDraw.Draw(field).ellipse(box, fill=255)
        field = field.filter(ImageFilter.GaussianBlur(3))
        picture = Image.composite(picture, Image.new("RGB", (width, height)), field)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def unframed(image: Pixels) -> Pixels:
    """uint8[3,S,S] as `decode` gives it where the version crops frames."""
    picture, side = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), image.shape[-1]
    seen = shrink(picture, kind="PNG", mode="RGB", width=side, height=side, size=side, crop_frame=True, preview_side=0)
    return seen.pixels if seen.lit else image


def percentiles(images: Pixels) -> Iterator[dict[str, str]]:
    """Of each measure over uint8[N,3,S,S]."""
    found = [asdict(measure(image)) for image in tqdm(images, desc="measure", unit="img", disable=None)]
    for name in found[0]:
        values = np.percentile([row[name] for row in found], PERCENTILES)
        yield {"measure": name} | {f"p{at:g}": f"{value:.4g}" for at, value in zip(PERCENTILES, values, strict=True)}


def row(
    group: str,
    labels: NDArray[np.int64],
    positive: NDArray[np.float64],
    threshold: float,
    *,
    of: NDArray[np.int64] | None = None,
) -> dict[str, str]:
    """Accuracy, its standard error, sensitivity, specificity and ROC-AUC of a group of images.

    Args:
        of: the number of the image that each one is a version of, where several are of one.
    """
    right = (positive >= threshold) == labels
    whole = np.arange(len(right)) if of is None else of
    error = np.sqrt(np.square(np.bincount(whole, right - right.mean())).sum()) / len(right) if len(right) else 0.0
    both = len(np.unique(labels)) == 2
    return {
        "group": group,
        "images": str(len(labels)),
        "accuracy": f"{right.mean():.4f}" if len(right) else "",
        "error": f"{error:.4f}" if len(right) else "",
        "sensitivity": f"{right[labels == 1].mean():.4f}" if labels.any() else "",
        "specificity": f"{right[labels == 0].mean():.4f}" if not labels.all() else "",
        "roc_auc": f"{roc_auc_score(labels, positive):.4f}" if both else "",
    }


def study(source: Path, *, images: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Percentiles of the measures, and accuracy by degradation and by what the gate says.

    Raises:
        StoreError, or ValueError where the data is absent or other data, or the version has other than two classes.
    """
    version, config, dataset = load_trained(source)
    manifest = version.manifest
    if "balanced" not in manifest.operating_points:
        raise ValueError(f"{source} has other than two classes: there is no single accuracy")
    threshold = manifest.operating_points["balanced"].threshold
    split = dataset.split(manifest.split.held_out_fold)
    table = list(percentiles(dataset.images[split.training].numpy()))
    members = np.random.default_rng(0).permutation(split.held_out)[:images]
    clean, labels = dataset.images[members].numpy(), dataset.labels[members].numpy()
    graph = ov.Core().compile_model(build_graph(manifest, version.weights), "CPU")

    def judged(batch: Pixels) -> NDArray[np.float64]:
        parts = [graph(batch[start : start + BATCH])["logits"] for start in range(0, len(batch), BATCH)]
        return calibrate(np.concatenate(parts), manifest.temperature)[:, -1]

    groups, positives, warned, rows = [], [], [], []
    variants = [("as it is", 0), *((kind, strength) for kind in KINDS for strength in STRENGTHS)]
    for kind, strength in tqdm(variants, desc="degradations", unit="set", disable=None):
        batch = clean
        if strength:
            batch = np.stack([spoil(image, kind, strength=strength, seed=i) for i, image in enumerate(clean)])
        if manifest.preprocessing.crop_frame:
            batch = np.stack([unframed(image) for image in batch])
        positive = judged(batch)
        group = [(asdict(measures), assess(measures)) for measures in map(measure, batch)]
        name = f"{kind} {strength}" if strength else kind
        share = {"warned": f"{np.mean([bool(q.warnings) for _, q in group]):.3f}"}
        share["severe"] = f"{np.mean([bool(q.spoilt) for _, q in group]):.3f}"
        rows.append(row(name, labels, positive, threshold) | share)
        groups.append(name)
        positives.append(positive)
        warned += group
    every, everything = np.tile(labels, len(variants)), np.concatenate(positives)
    of = np.tile(np.arange(len(labels)), len(variants))
    none = np.array([not q.warnings for _, q in warned])
    rows.append(row("no warning", every[none], everything[none], threshold, of=of[none]))
    for limit in LIMITS:
        values = np.array([measures[limit.measure] for measures, _ in warned])
        sign = 1 if limit.above else -1
        past = sign * values > sign * limit.warn
        edges = np.quantile(sign * values[past], (0, 1 / 3, 2 / 3, 1)) if past.sum() >= 60 else ()
        for low, high in pairwise(edges):  # bands further and further beyond the limit
            band = past & (sign * values >= low) & (sign * values <= high)
            side = "above" if limit.above else "below"
            name = f"{limit.measure} {side} {sign * low:.3g}, to {sign * high:.3g}"
            rows.append(row(name, every[band], everything[band], threshold, of=of[band]))
    pixels, theirs = (part[split.held_out_extra].numpy() for part in (dataset.images, dataset.labels))
    if len(pixels):  # of other clinics, as they are
        positive, found = judged(pixels), [assess(measure(image)).warnings for image in pixels]
        words = ("no warning", *dict.fromkeys(warning for warnings in found for warning in warnings))
        for word in words:
            members = np.array([word in warnings or (word == words[0] and not warnings) for warnings in found])
            rows.append(row(f"{config.data.extra}: {word}", theirs[members], positive[members], threshold))
    return table, [*rows, *frames(config, dataset, manifest.split.held_out_fold, judged, threshold)]


def frames(config: Config, dataset: Dataset, fold: int, judged: Judge, threshold: float) -> Iterator[dict[str, str]]:
    """Held-out images in a dark frame, with it and without, and those that have none."""
    crops = config.data.crop_frame
    other = load_dataset(config.data.model_copy(update={"crop_frame": not crops}), seed=config.seed)
    kept, cropped = (other, dataset) if crops else (dataset, other)
    split = kept.split(fold)
    for folder, members in ((config.data.root, split.held_out), (config.data.extra, split.held_out_extra)):
        whole, lit = (part.images[members].numpy() for part in (kept, cropped))
        labels, framed = kept.labels[members].numpy(), (whole != lit).any(axis=(1, 2, 3))
        for name, pixels, group in (
            ("frame kept", whole, framed),
            ("frame cropped", lit, framed),
            ("no frame", whole, ~framed),
        ):
            if group.any():
                yield row(f"{folder}: {name}", labels[group], judged(pixels[group]), threshold)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=Path, required=True, help="folder of a published version")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="the CSV files go here")
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out images that are spoilt")
    options = parser.parse_args(arguments)
    try:
        table, rows = study(options.version, images=options.images)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.quality: {error}")
    for name, lines in (("quality_percentiles.csv", table), ("quality.csv", rows)):
        columns = list(dict.fromkeys(key for line in lines for key in line))
        write_csv(options.out / name, columns, [[line.get(key, "") for key in columns] for line in lines])
        for line in lines:
            print("  ".join(f"{key} {value}" for key, value in line.items()))
    print(f"done: {options.out / 'quality.csv'}")


if __name__ == "__main__":
    main()
