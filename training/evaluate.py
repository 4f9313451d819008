"""Print how good a version is; metrics are pure functions of labels and scores.

python -m training.evaluate                                            # what was held out while training
python -m training.evaluate --data /data/clinic --evidence runs/evidence   # images of another place, as served
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn import metrics as sk
from torch import Tensor, nn
from tqdm import tqdm

from app.model import store
from app.model.architecture import from_version
from app.model.labels import calibrate
from app.model.manifest import Metric
from training.config import Config, Data
from training.data import load_dataset
from training.published import load_version
from training.statistics import RESAMPLES

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def ranking_metrics(labels: Labels, probabilities: Floats) -> dict[str, float]:
    """Metrics that need no threshold; `labels` [N] of 0 and 1, `probabilities` [N] of class 1."""
    return {
        "roc_auc": float(sk.roc_auc_score(labels, probabilities)),
        "pr_auc": float(sk.average_precision_score(labels, probabilities)),
        "log_loss": float(sk.log_loss(labels, probabilities, labels=[0, 1])),
        "brier": float(sk.brier_score_loss(labels, probabilities)),
        "ece": calibration_error(labels, probabilities),
    }


def decision_metrics(labels: Labels, positive: NDArray[np.bool_]) -> dict[str, float]:
    """Metrics of yes-or-no decisions [N] against labels [N]."""
    tn, fp, fn, tp = (int(n) for n in sk.confusion_matrix(labels, positive, labels=[0, 1]).ravel())
    return {
        "accuracy": (tp + tn) / len(labels),
        "balanced_accuracy": (tp / max(tp + fn, 1) + tn / max(tn + fp, 1)) / 2,
        "precision": tp / max(tp + fp, 1),
        "sensitivity": tp / max(tp + fn, 1),
        "specificity": tn / max(tn + fp, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
    }


def multiclass_metrics(labels: Labels, probabilities: Floats, predicted: Labels) -> dict[str, float]:
    """Metrics of more than two classes; `probabilities` [N,K], `predicted` [N]. Calibration is that of the winner."""
    return {
        "roc_auc": float(sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")),
        "log_loss": float(sk.log_loss(labels, probabilities, labels=range(probabilities.shape[1]))),
        "ece": calibration_error((labels == predicted).astype(np.int64), probabilities.max(axis=1)),
        "accuracy": float((labels == predicted).mean()),
        "balanced_accuracy": float(sk.balanced_accuracy_score(labels, predicted)),
    }


def calibration_error(labels: Labels, probabilities: Floats, *, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass (Nixon et al. 2019)."""
    members = equal_mass_bins(probabilities, bins=bins)
    gaps = [len(m) * abs(labels[m].mean() - probabilities[m].mean()) for m in members]
    return float(sum(gaps) / len(labels))


def calibration_floor(probabilities: Floats, *, draws: int = 200, seed: int = 0) -> float:
    """What `calibration_error` is on average where the probabilities [N] are right: more for fewer images."""
    drawn = np.random.default_rng(seed).random((draws, len(probabilities))) < probabilities
    return float(np.mean([calibration_error(labels.astype(np.int64), probabilities) for labels in drawn]))


def equal_mass_bins(probabilities: Floats, *, bins: int = 15) -> list[NDArray[np.int64]]:
    """Indices of the images in each of at most `bins` bins that hold the same number of them, lowest first."""
    return [part for part in np.array_split(np.argsort(probabilities, kind="stable"), bins) if len(part)]


def with_intervals(
    measure: Callable[[Labels, Floats, Any], dict[str, float]],
    labels: Labels,
    probabilities: Floats,
    decided: NDArray[Any],
    *,
    seed: int = 0,
) -> dict[str, Metric]:
    """Each metric with its 95% percentile interval over bootstrap resamples of the images.

    Of more than two classes each is resampled on its own: with many small ones hardly a draw would hold them all.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
    drawn: list[dict[str, float]] = []
    while len(drawn) < RESAMPLES:
        if len(members) > 2:
            pick = np.concatenate([rng.choice(kind, len(kind)) for kind in members])
        else:
            pick = rng.integers(len(labels), size=len(labels))
        if len(np.unique(labels[pick])) == len(members):  # without one of them ROC-AUC has no value
            drawn.append(measure(labels[pick], probabilities[pick], decided[pick]))
    result = {}
    for name, value in measure(labels, probabilities, decided).items():
        low, high = np.percentile([d[name] for d in drawn], [2.5, 97.5])
        result[name] = Metric(value=value, low=float(low), high=float(high))
    return result


def all_metrics(labels: Labels, probabilities: Floats, positive: NDArray[np.bool_]) -> dict[str, float]:
    return ranking_metrics(labels, probabilities) | decision_metrics(labels, positive)


@torch.inference_mode()
def predict_logits(
    model: nn.Module, images: Tensor, *, size: int, device: torch.device, batch_size: int = 32
) -> Tensor:
    """uint8[N,3,H,W] -> float32[N,K] logits at a resolution; puts the model into eval mode."""
    model.eval()
    rows = []
    for batch in tqdm(images.split(batch_size), desc="evaluate", leave=False, disable=None):
        x = batch.to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        if size != x.shape[-1]:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        rows.append(model(x).logits.float().cpu())
    return torch.cat(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the current one")
    parser.add_argument("--data", help="a folder of the same classes; twins of the training images are left out")
    parser.add_argument("--evidence", type=Path, help="with --data: add the figures to external.csv in this folder")
    options = parser.parse_args(arguments)
    try:
        version = options.version or store.current(options.store, options.name)
        folder = options.store / options.name / version
        if options.data:
            found = evaluate_elsewhere(folder, options.data)
            title = f"{options.name} {version} on {found.images} images of {options.data} that it has not seen"
            if options.evidence:
                add_external(options.evidence / "external.csv", f"version {version}", options.data, found)
        else:
            manifest = store.read_manifest(options.store, options.name, version)
            found = Figures(manifest.split.held_out_images, manifest.metrics)
            title = f"{options.name} {version}, held out while training, cross-fitted"
    except (store.StoreError, ValueError) as error:
        sys.exit(f"training.evaluate: {error}")
    print_metrics(title, found.metrics)


class Figures(NamedTuple):
    images: int
    metrics: dict[str, Metric]


def print_metrics(title: str, metrics: Mapping[str, Metric]) -> None:
    print(title)
    for key, metric in metrics.items():
        print(f"{key:18} {metric.value:.4f}  95% {metric.low:.4f} to {metric.high:.4f}")


def served_logits(folder: Path, images: Tensor) -> NDArray[np.float32]:
    """Logits float32[N,K] of a published version for uint8[N,3,S,S], in float32 on the CPU.

    Raises:
        StoreError.
    """
    loaded = load_version(folder)
    model = from_version(loaded.manifest, loaded.weights).to(memory_format=torch.channels_last)
    size = loaded.manifest.preprocessing.size
    return np.asarray(predict_logits(model, images, size=size, device=torch.device("cpu")).numpy())


def evaluate_elsewhere(folder: Path, data: str) -> Figures:
    """The metrics of a version with two classes as it is served, on a folder less the twins of what it was trained on.

    Raises:
        StoreError, or ValueError where the data is absent or was trained on, or the version has other than two classes.
    """
    manifest = store.read_manifest(folder.parent.parent, folder.parent.name, folder.name)
    past = Config.model_validate(manifest.training_config)
    if "balanced" not in manifest.operating_points:
        raise ValueError(f"{folder} has other than two classes: only its held-out figures can be printed")
    seen = [name for name in (past.data.root, past.data.extra, *past.data.without) if name]
    if data in seen:
        raise ValueError(f"{folder} was trained on {data}: without --data its held-out figures are printed")
    spec = Data(
        root=data,
        classes=list(manifest.classes),
        crop_frame=manifest.preprocessing.crop_frame,
        without=[name for name in seen if name != "drawn"],
    )
    dataset = load_dataset(spec, seed=past.seed)
    labels = dataset.labels.numpy()
    probabilities = calibrate(served_logits(folder, dataset.images), manifest.temperature)[:, 1]
    positive = probabilities >= manifest.operating_points["balanced"].threshold
    return Figures(len(labels), with_intervals(all_metrics, labels, probabilities, positive))


def add_external(path: Path, setting: str, data: str, found: Figures) -> None:
    """Put figures into external.csv in place of those of the same setting and data."""
    rows = []
    if path.is_file():
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if (row["setting"], row["data"]) != (setting, data)]
    for key, metric in found.metrics.items():
        values = {"value": metric.value, "low": metric.low, "high": metric.high}
        formatted = {name: f"{value:.6f}" for name, value in values.items()}
        rows.append({"setting": setting, "data": data, "images": str(found.images), "metric": key} | formatted)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
