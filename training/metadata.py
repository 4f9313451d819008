"""Fit the head that adds age, sex and site to a version's logits, and measure what it gains. Experimental.

python -m training.metadata --version runs/store/asff-resnet50/1 --drawn                        # the figures alone
python -m training.metadata --version runs/store/asff-resnet50/1 --table clinic.csv --publish runs/store

A table has the columns image (a path, from the table's folder), age, sex, site and label; an empty cell is not known.
Its images must be new to the version: of those that it was trained on it is too sure for the rest to count.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from app.model import store
from app.model.manifest import MetadataFusion, Metric, Preprocessing
from app.model.metadata import FIELDS, FILE, PLACES, WIDTH, Field, Fusion, Metadata
from app.model.preprocess import ImageError, decode
from app.model.store import LoadedVersion
from training.data import assign_folds, near_duplicates
from training.drawn import draw_cases
from training.evaluate import Floats, Labels, served_logits, with_intervals
from training.export import publish_again
from training.published import load_trained, load_version
from training.tables import write_csv

UNITS = 8  # of the hidden layer
DROPOUT = 0.3  # of each field of each image in each step, by itself
STEPS, RATE = 300, 0.02  # of Adam, each over all images
PENALTY = 2  # on the squared weights, by N: lighter ones learned from fields that say nothing
DRAWN = 600
ALONE = "image alone"
COLUMNS = ("known", "images", "roc_auc", "low", "high", "gain", "gain_low", "gain_high")
TABLE = ("image", *FIELDS, "label")

Singles = NDArray[np.float32]


class Cases(NamedTuple):
    """N images with their classes and what else is known of them."""

    images: Tensor  # uint8[N,3,S,S]
    labels: Labels  # [N]
    known: list[Metadata]
    groups: NDArray[np.int64]  # [N], what must not be on both sides of a split
    source: str  # in words


def drawn_cases(count: int, *, size: int, seed: int = 0, effect: float = 1) -> Cases:
    """Of `training.drawn.draw_cases`, at `size` pixels."""
    drawn = list(tqdm(draw_cases(count, seed=seed, effect=effect), desc="draw", total=count, disable=None))
    return Cases(
        torch.stack([torch.from_numpy(decode(case.image, size=size).pixels) for case in drawn]),
        np.array([case.label for case in drawn]),
        [case.metadata for case in drawn],
        np.arange(count),
        f"drawn lesions (training/drawn.py, seed {seed}, effect {effect:g}), which say nothing about patients",
    )


def read_table(path: Path, *, classes: Sequence[str], prepared: Preprocessing) -> Cases:
    """The images that a table names, decoded as serving decodes them; near-duplicates are one group.

    Raises:
        ValueError: the table lacks a column, or a line cannot be used; the message names it. OSError.
    """
    images, labels, known = [], [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if missing := [name for name in TABLE if name not in (table.fieldnames or ())]:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        for line, row in enumerate(table, start=2):
            try:
                if row["label"] not in classes:
                    raise ValueError(f"label: give one of {', '.join(classes)}")
                labels.append(classes.index(row["label"]))
                age = float(row["age"]) if row["age"] else None
                known.append(Metadata(age, row["sex"] or None, row["site"] or None))  # type: ignore[arg-type] # it checks
                found = (path.parent / row["image"]).read_bytes()
                pixels = decode(found, size=prepared.size, crop_frame=prepared.crop_frame).pixels
                images.append(torch.from_numpy(pixels))
            except (ValueError, ImageError, OSError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
    if not images:
        raise ValueError(f"{path} names no image")
    stacked = torch.stack(images)
    return Cases(stacked, np.array(labels), known, near_duplicates(stacked), f"images of {path.name}")


def refuse_trained_on(source: Path, cases: Cases) -> bool:
    """Whether the images that the version in `source` was trained on are here to compare with.

    Raises:
        ValueError: a case is one of them, or a near-duplicate.
    """
    try:
        version, _, dataset = load_trained(source)
    except ValueError:
        return False
    seen = dataset.images[dataset.split(version.manifest.split.held_out_fold).training]
    groups = near_duplicates(torch.cat([cases.images, seen]))
    twins = int(np.isin(groups[: len(cases.images)], groups[len(cases.images) :]).sum())
    if twins:
        raise ValueError(f"{twins} of the images trained {source}, or are near-duplicates of such: give new ones")
    return True


def drop_fields(codes: Tensor, generator: torch.Generator) -> Tensor:
    """Encodings float32[N,WIDTH] with each field of each row missing by chance, and so at times all of them."""
    columns = torch.zeros(len(FIELDS), WIDTH)
    for row, field in enumerate(FIELDS):
        columns[row, PLACES[field]] = 1
    kept = (torch.rand(len(codes), len(FIELDS), generator=generator) >= DROPOUT).float()
    return codes * (kept @ columns)


def fit(logits: Singles, codes: Singles, labels: Labels, *, temperature: float, seed: int = 0) -> Fusion:
    """The head for logits [N,K] and encodings [N,WIDTH]; log-loss at the version's temperature, which stays."""
    generator = torch.Generator().manual_seed(seed)
    z, known, y = torch.from_numpy(logits), torch.from_numpy(codes), torch.from_numpy(labels)
    inputs, classes = z.shape[1] + WIDTH, z.shape[1]
    hidden = (torch.randn(UNITS, inputs, generator=generator) / inputs**0.5).requires_grad_()
    bias = torch.zeros(UNITS, requires_grad=True)
    out = torch.zeros(classes, UNITS, requires_grad=True)  # begins as the image alone
    optimiser = torch.optim.Adam([hidden, bias, out], lr=RATE)
    for _ in range(STEPS):
        alone = z @ hidden[:, :classes].T + bias
        both = alone + drop_fields(known, generator) @ hidden[:, classes:].T
        fused = z + (both.relu() - alone.relu()) @ out.T
        size = hidden.square().sum() + out.square().sum()
        optimiser.zero_grad()
        (F.cross_entropy(fused / temperature, y) + PENALTY * size / len(y)).backward()
        optimiser.step()
    return Fusion(*(array.detach().numpy() for array in (hidden, bias, out)))


def roc_aucs(labels: Labels, scores: Floats) -> Floats:
    """Of each column of scores [N,S] against labels [N] of 0 and 1, as Mann and Whitney's U."""
    positive = labels == 1
    count = int(positive.sum())
    ranks = rankdata(scores, axis=0)[positive].sum(axis=0)
    return np.asarray((ranks - count * (count + 1) / 2) / (count * (len(labels) - count)))


def compare(
    fusion: Fusion, logits: Singles, codes: Singles, labels: Labels, *, fields: Sequence[Field]
) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """ROC-AUC by what is known, and its gain on the image alone, of logits [N,2]; the resamples are paired."""
    known = {ALONE: np.zeros_like(codes), "all fields": codes}
    for field in fields:
        known[f"no {field}"] = codes.copy()
        known[f"no {field}"][:, PLACES[field]] = 0
    fused = (fusion(logits, code) for code in known.values())
    scores = np.stack([one[:, 1] - one[:, 0] for one in fused], axis=1).astype(np.float64)

    def measure(labels: Labels, scores: Floats, _: object) -> dict[str, float]:
        found = roc_aucs(labels, scores)
        gains = {f"gain {name}": float(value - found[0]) for name, value in zip(known, found, strict=True)}
        return {name: float(value) for name, value in zip(known, found, strict=True)} | gains

    metrics = with_intervals(measure, labels, scores, labels)
    return {name: metrics[name] for name in known}, {name: metrics[f"gain {name}"] for name in known}


def publish(version: LoadedVersion, source: Path, fusion: Fusion, about: MetadataFusion, *, into: Path) -> Path:
    """Publish the version in folder `source` with the head, under the next number of the store `into`.

    Raises:
        StoreError.
    """
    manifest = version.manifest
    files = {file: (source / file).read_bytes() for file in manifest.files}
    files[FILE] = safetensors.numpy.save(fusion.arrays())
    return publish_again(manifest, files, into=into, metadata=about)


def run(source: Path, cases: Cases, out: Path, *, into: Path | None = None) -> tuple[MetadataFusion, Path | None]:
    """Fit on one half of the cases, measure on the other, write metadata.csv into `out`; and the folder published.

    Raises:
        StoreError: the version is damaged. ValueError: it has other than two classes, or nothing is known of any image.
    """
    version = load_version(source)
    if len(version.manifest.classes) != 2:
        raise ValueError(f"{source} has other than two classes")
    fields = tuple(field for field in FIELDS if any(field in one.known for one in cases.known))
    if not fields:
        raise ValueError("nothing is known of any image but the image")
    logits, codes = served_logits(source, cases.images), np.stack([one.encode() for one in cases.known])
    folds = assign_folds(cases.groups, cases.labels, folds=2, seed=0)
    mine, held = folds == 0, folds == 1
    if any(len(np.unique(cases.labels[half])) < 2 for half in (mine, held)):
        raise ValueError("each half needs images of both classes: give more")
    fusion = fit(logits[mine], codes[mine], cases.labels[mine], temperature=version.manifest.temperature)
    roc_auc, gain = compare(fusion, logits[held], codes[held], cases.labels[held], fields=fields)
    about = MetadataFusion(
        experimental=True,
        fields=fields,
        trained_on=f"{mine.sum()} {cases.source}",
        held_out=f"{held.sum()} {cases.source}",
        roc_auc=roc_auc,
        gain=gain,
    )
    write_csv(out / "metadata.csv", COLUMNS, rows(about, images=int(held.sum())))
    return about, publish(version, source, fusion, about, into=into) if into else None


def rows(about: MetadataFusion, *, images: int) -> list[list[str]]:
    """Of `COLUMNS`."""
    return [
        [known, str(images), *(f"{m:.4f}" for one in (auc, about.gain[known]) for m in (one.value, one.low, one.high))]
        for known, auc in about.roc_auc.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.metadata", description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=Path, required=True, help="folder of a published version")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", type=Path, metavar="CSV", help="image, age, sex, site and label of new images")
    source.add_argument("--drawn", type=int, nargs="?", const=DRAWN, metavar="IMAGES", help=f"drawn ones ({DRAWN})")
    parser.add_argument("--effect", type=float, default=1, help="of --drawn: what age and site say; 0: nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="metadata.csv goes here")
    parser.add_argument("--publish", type=Path, metavar="STORE", help="publish the version with the head here")
    options = parser.parse_args(arguments)
    try:
        manifest = load_version(options.version).manifest
        if options.table:
            cases = read_table(options.table, classes=manifest.classes, prepared=manifest.preprocessing)
            if not refuse_trained_on(options.version, cases):
                print("not checked: whether the images are new, since those that trained the version are not here")
        else:
            cases = drawn_cases(options.drawn, size=manifest.preprocessing.size, effect=options.effect)
        about, folder = run(options.version, cases, options.out, into=options.publish)
    except (OSError, ValueError, store.StoreError) as error:
        sys.exit(f"training.metadata: {error}")
    print(f"experimental; held out: {about.held_out}")
    for known, auc in about.roc_auc.items():
        gain = about.gain[known]
        print(
            f"{known:12} ROC-AUC {auc.value:.4f} ({auc.low:.4f} to {auc.high:.4f})  "
            f"gain {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
        )
    print(f"published {folder}" if folder else f"done: {options.out / 'metadata.csv'}")


if __name__ == "__main__":
    main()
