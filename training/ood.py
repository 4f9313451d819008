"""When a version should not answer: fit the distance from its training images, and measure what that finds.

python -m training.ood --version model_store/asff-resnet50/7 --out runs/evidence             # the figures alone
python -m training.ood --version model_store/asff-resnet50/7 --out runs/evidence --publish   # the next version has it

Statistics come from training images alone, the threshold from held-out dermoscopy that the quality gate has nothing
against; the method was chosen on foreign images (`training/foreign.py`) that are not those it is measured on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import safetensors.numpy
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from tqdm import tqdm

from app.model import store
from app.model.manifest import OutOfDistribution
from app.model.openvino_graph import build_graph
from app.model.out_of_distribution import FILE, Familiar
from app.model.quality import assess, measure
from app.model.store import LoadedVersion
from training.data import Dataset
from training.export import publish_again
from training.foreign import Foreign, foreign_images
from training.published import load_trained
from training.tables import write_csv

AXES = 64  # directions with a variance of their own; docs/decisions/015
FLAGGED = 0.01  # of any folder of held-out dermoscopy; the bar is 0.02 on images that come later
NEIGHBOURS = 10
BATCH = 16
CLEAR = ", no quality warning"
SCORES, SUMMARY, METHODS = "ood_scores.csv", "ood.csv", "ood_methods.csv"

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
Images = NDArray[np.uint8]


class Seen(NamedTuple):
    """Features [N,C] of every part; of the two that may set the threshold, which images no quality warning is about."""

    training: Floats
    home: Floats  # held-out dermoscopy of `data.root`
    abroad: Floats  # of `data.extra`
    choose: Floats  # foreign images
    evaluate: Floats
    clear_home: NDArray[np.bool_]  # [N]
    clear_abroad: NDArray[np.bool_]


class Row(NamedTuple):
    """What became of one kind of image."""

    kind: str
    images: int
    foreign: bool
    auroc: float | None  # against held-out dermoscopy of `data.root`; None for dermoscopy
    flagged: float  # share


def fit(features: Floats, *, axes: int) -> Familiar:
    """The Gaussian of features [N,C], with so many directions of their own variance (or as many as there can be)."""
    mean = features.mean(axis=0, dtype=np.float64)
    _, singular, rows = np.linalg.svd(features - mean, full_matrices=False)
    variances = np.square(singular) / (len(features) - 1)
    axes = min(axes, len(features) - 2)
    left = variances[axes:].sum() / (features.shape[1] - axes)
    return Familiar(
        mean=mean.astype(np.float32),
        axes=np.ascontiguousarray(rows[:axes].T, dtype=np.float32),
        deviations=np.sqrt(variances[:axes]).astype(np.float32),
        rest=float(np.sqrt(left)),
    )


def knn_scores(training: Floats, features: Floats) -> Scores:
    """Distance to the 10th nearest training image on the unit sphere (Sun et al. 2022, arXiv 2204.06507)."""
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, training))
    nearest = np.sort(ours @ theirs.T, axis=1)[:, -min(NEIGHBOURS, len(training))]
    return np.asarray(np.sqrt(np.maximum(2 - 2 * nearest, 0)), dtype=np.float64)


def relative_scores(familiar: Familiar, background: Familiar, features: Floats) -> Scores:
    """Mahalanobis distance less that to one broad Gaussian (Ren et al. 2021, arXiv 2106.09022), both squared."""
    return np.asarray(np.square(familiar.score(features)) - np.square(background.score(features)))


def compare_methods(seen: Seen) -> list[dict[str, str]]:
    """AUROC of each method, foreign images of the choosing set against held-out dermoscopy."""
    found: dict[str, tuple[Scores, Scores]] = {}
    for axes in (0, 16, AXES, 256):
        familiar = fit(seen.training, axes=axes)
        found[f"ppca-mahalanobis, {axes} axes"] = (familiar.score(seen.home), familiar.score(seen.choose))
    familiar, background = fit(seen.training, axes=256), fit(seen.training, axes=0)
    home, foreign = (relative_scores(familiar, background, part) for part in (seen.home, seen.choose))
    found["relative mahalanobis"] = (home, foreign)
    found["10th nearest neighbour"] = (knn_scores(seen.training, seen.home), knn_scores(seen.training, seen.choose))
    return [
        {
            "method": name,
            "auroc": f"{auroc(home, foreign):.4f}",
            "found_at_1_percent": f"{(foreign > np.quantile(home, 1 - FLAGGED)).mean():.4f}",
        }
        for name, (home, foreign) in found.items()
    ]


def threshold_of(dermoscopy: Sequence[Scores]) -> float:
    """The lowest threshold above which lies no more than `FLAGGED` of any folder's scores."""
    return max(float(np.quantile(scores, 1 - FLAGGED)) for scores in dermoscopy)


def auroc(home: Scores, foreign: Scores) -> float:
    """How well a score tells foreign images [M] from dermoscopy [N]."""
    return float(roc_auc_score(np.repeat([0, 1], [len(home), len(foreign)]), np.concatenate([home, foreign])))


def cross_fitted_share(scores: Scores, others: Sequence[Scores], *, pieces: int = 5) -> float:
    """Share of a folder's scores [N] above a threshold that was set without them; `others` are other folders'."""
    above = 0
    for rest, mine in KFold(min(pieces, len(scores)), shuffle=True, random_state=0).split(scores):
        above += int((scores[mine] > threshold_of([scores[rest], *others])).sum())
    return above / len(scores)


def features_of(graph: ov.Model, images: Images, *, what: str, hint: str = "f32") -> Floats:
    """Pooled features float32[N,C] of uint8[N,3,S,S]."""
    if not len(images):  # a version that knows one folder alone
        return np.empty((0, 0), dtype=np.float32)
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    starts = tqdm(range(0, len(images), BATCH), desc=what, unit="batch", disable=None)
    return np.concatenate([compiled(images[start : start + BATCH])["features"] for start in starts])


def look(version: LoadedVersion, dataset: Dataset, foreign: dict[str, list[Foreign]]) -> Seen:
    """The features of every part, in float32."""
    graph = build_graph(version.manifest, version.weights)
    split = dataset.split(version.manifest.split.held_out_fold)
    parts = [
        ("training", dataset.images[split.training].numpy()),
        ("home", dataset.images[split.held_out].numpy()),
        ("abroad", dataset.images[split.held_out_extra].numpy()),
        *((name, np.stack([image.pixels for image in images])) for name, images in foreign.items()),
    ]
    clear = [np.array([not assess(measure(x)).warnings for x in images], dtype=bool) for _, images in parts[1:3]]
    training, home, abroad, choose, evaluate = (features_of(graph, images, what=name) for name, images in parts)
    return Seen(training, home, abroad, choose, evaluate, clear_home=clear[0], clear_abroad=clear[1])


def evaluate(
    familiar: Familiar, threshold: float, seen: Seen, foreign: Sequence[Foreign], *, home: str, abroad: str
) -> tuple[list[Row], list[tuple[str, float]]]:
    """What the threshold does to each kind of image, and the score of each image with its kind.

    Args:
        home, abroad: names of the folders of dermoscopy.
    """
    scores = {home: familiar.score(seen.home)}
    if len(seen.abroad):
        scores[abroad] = familiar.score(seen.abroad)
    kinds = np.array([image.kind for image in foreign])
    of_foreign = familiar.score(seen.evaluate)
    scores |= {kind: of_foreign[kinds == kind] for kind in dict.fromkeys(kinds.tolist())}
    rows, clear = [], {home: scores[home][seen.clear_home]}
    if len(seen.abroad):
        clear[abroad] = scores[abroad][seen.clear_abroad]
    for folder, mine in clear.items():
        others = [values for kind, values in clear.items() if kind != folder and len(values)]
        flagged = float((scores[folder] > threshold).mean())
        rows.append(Row(folder, len(scores[folder]), foreign=False, auroc=None, flagged=flagged))
        if len(mine) > 1:
            share = cross_fitted_share(mine, others)
            rows.append(Row(f"{folder}{CLEAR}", len(mine), foreign=False, auroc=None, flagged=share))
    for kind, values in [*scores.items(), ("all", of_foreign)]:
        if kind not in (home, abroad):
            flagged = float((values > threshold).mean())
            rows.append(Row(kind, len(values), foreign=True, auroc=auroc(scores[home], values), flagged=flagged))
    return rows, [(kind, float(value)) for kind, values in scores.items() for value in values]


def precisions(version: LoadedVersion, familiar: Familiar, images: Images, exact: Floats) -> dict[str, float]:
    """Largest change of a score on images [N] by what else the version is served in, where it can run here."""
    graph, found = build_graph(version.manifest, version.weights), {}
    runs = {"bfloat16": (graph, "bf16"), "float16": (graph, "f16")}
    if version.int8:
        int8 = ov.Core().read_model(*version.int8)
        if len(int8.outputs) == len(graph.outputs):
            runs["int8"] = (int8, "f32")
    for name, (model, hint) in runs.items():
        try:
            features = features_of(model, images, what=name, hint=hint)
        except RuntimeError:  # the processor does not compute in it
            continue
        found[name] = float(np.abs(familiar.score(features) - familiar.score(exact)).max())
    return found


def publish(version: LoadedVersion, source: Path, familiar: Familiar, limits: OutOfDistribution, out: Path) -> Path:
    """Publish the version in folder `source` again under the next number, with its limits and their evidence.

    An int8 graph from before there were features is left out: quantise the new version.

    Raises:
        StoreError.
    """
    root, manifest = source.parent.parent, version.manifest
    files = {file: (source / file).read_bytes() for file in manifest.files}
    changes: dict[str, Any] = {"out_of_distribution": limits}
    if version.int8 and len(ov.Core().read_model(*version.int8).outputs) < 3:
        files = {file: data for file, data in files.items() if file not in store.INT8}
        changes["quantization"] = None
    files[FILE] = safetensors.numpy.save(familiar.arrays())
    files |= {f"report/{name}": (out / name).read_bytes() for name in (SCORES, SUMMARY, METHODS)}
    return publish_again(manifest, files, into=root, **changes)


def run(source: Path, out: Path, *, publishing: bool = False) -> Path | None:
    """Fit and measure the version in folder `source`, write the CSV files into `out`; the folder published, if any.

    Raises:
        StoreError: the version is damaged. ValueError: its data are not here, or are other data.
    """
    version, config, dataset = load_trained(source)
    manifest = version.manifest
    split = dataset.split(manifest.split.held_out_fold)
    if not len(split.held_out):
        raise ValueError(f"{source} held nothing out: there is nothing to set the threshold on")
    foreign = {part: list(foreign_images(part)) for part in ("choose", "evaluate")}
    seen = look(version, dataset, foreign)
    familiar = fit(seen.training, axes=AXES)
    clear = (seen.home[seen.clear_home], seen.abroad[seen.clear_abroad] if len(seen.abroad) else seen.abroad)
    clear = clear if any(map(len, clear)) else (seen.home, seen.abroad)
    threshold = threshold_of([familiar.score(part) for part in clear if len(part)])
    home, abroad = config.data.root, config.data.extra or ""
    rows, scores = evaluate(familiar, threshold, seen, foreign["evaluate"], home=home, abroad=abroad)
    limits = OutOfDistribution(
        method="ppca-mahalanobis",
        threshold=threshold,
        fitted_on=f"{len(seen.training)} training images; threshold on {sum(map(len, clear))} held out",
        flagged={row.kind: row.flagged for row in rows if not row.foreign},
        auroc={row.kind: row.auroc for row in rows if row.foreign and row.auroc is not None},
    )
    methods = compare_methods(seen)
    write_csv(out / METHODS, list(methods[0]), [list(row.values()) for row in methods])
    write_csv(out / SUMMARY, Row._fields, [["" if v is None else v for v in row] for row in rows])
    write_csv(out / SCORES, ("kind", "score"), [(kind, f"{value / threshold:.5f}") for kind, value in scores])
    held_out = dataset.images[split.held_out].numpy()
    moved = precisions(version, familiar, held_out, seen.home)
    summarise(rows, methods, moved, threshold)
    return publish(version, source, familiar, limits, out) if publishing else None


def summarise(
    rows: Sequence[Row], methods: Sequence[dict[str, str]], moved: dict[str, float], threshold: float
) -> None:
    for row in methods:
        print(
            f"{row['method']:28} AUROC {row['auroc']}  found at 1% flagged {row['found_at_1_percent']}  (choosing set)"
        )
    for result in rows:
        area = "" if result.auroc is None else f"AUROC {result.auroc:.4f}"
        print(f"{result.kind:28} {result.images:5} images  flagged {result.flagged:.4f}  {area}")
    for name, most in moved.items():
        print(f"{name:28} moves a score by {most / threshold:.4f} of the threshold at most")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ood", description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=Path, required=True, help="folder of a published version")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="the CSV files go here")
    parser.add_argument("--publish", action="store_true", help="publish the version again with it, as the next number")
    options = parser.parse_args(arguments)
    try:
        folder = run(options.version, options.out, publishing=options.publish)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.ood: {error}")
    print(f"published {folder}: promote it, or training.quantize it first" if folder else f"done: {options.out}")


if __name__ == "__main__":
    main()
