"""Evaluate a published version on its held-out fold; metrics are pure functions of labels and scores.

python -m training.evaluate --version 1 --csv held_out.csv
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

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
from training.config import Config
from training.data import load_dataset

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
RESAMPLES = 2000


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
        "precision": tp / max(tp + fp, 1),
        "sensitivity": tp / max(tp + fn, 1),
        "specificity": tn / max(tn + fp, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
    }


def calibration_error(labels: Labels, probabilities: Floats, *, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass (Nixon et al. 2019)."""
    parts = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    gaps = [len(p) * abs(labels[p].mean() - probabilities[p].mean()) for p in parts if len(p)]
    return float(sum(gaps) / len(labels))


def with_intervals(
    measure: Callable[[Labels, Floats, NDArray[np.bool_]], dict[str, float]],
    labels: Labels,
    probabilities: Floats,
    positive: NDArray[np.bool_],
    *,
    seed: int = 0,
) -> dict[str, Metric]:
    """Each metric with its 95% percentile interval over bootstrap resamples of the images."""
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < RESAMPLES:
        pick = rng.integers(len(labels), size=len(labels))
        if 0 < labels[pick].sum() < len(labels):  # both classes, else ROC-AUC has no value
            drawn.append(measure(labels[pick], probabilities[pick], positive[pick]))
    result = {}
    for name, value in measure(labels, probabilities, positive).items():
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


def write_predictions(path: Path, names: list[str], labels: Labels, logits: Floats, probabilities: Floats) -> None:
    """One row an image: name, label, logit difference and calibrated probability of class 1."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label", "logit", "probability"])
        for row in zip(names, labels, logits[:, 1] - logits[:, 0], probabilities, strict=True):
            writer.writerow([row[0], row[1], f"{row[2]:.6f}", f"{row[3]:.6f}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Evaluate a published version on its held-out fold."
    )
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the current one")
    parser.add_argument("--csv", type=Path, help="write a row an image here")
    options = parser.parse_args(arguments)
    try:
        evaluate(options.store, options.name, options.version, options.csv)
    except (store.StoreError, ValueError) as error:
        sys.exit(f"training.evaluate: {error}")


def evaluate(root: Path, name: str, version: str | None, csv_path: Path | None) -> None:
    """Print the metrics of a version on the fold that it was not trained on.

    Raises:
        StoreError, or ValueError where the data is absent or not what the version was trained on.
    """
    from training.calibrate import cross_fitted  # which imports this module

    loaded = store.load(root, name, version or store.current(root, name))
    manifest = loaded.manifest
    config = Config.model_validate(manifest.training_config)
    dataset = load_dataset(config.data, seed=config.seed)
    if dataset.fingerprint != manifest.split.fingerprint:
        raise ValueError(f"{config.data.root} is not the data that {name} {manifest.version} was trained on")
    _, held_out = dataset.split(config.data.held_out_fold)
    model = from_version(manifest, loaded.weights).to(memory_format=torch.channels_last)
    size = manifest.preprocessing.size
    logits = predict_logits(model, dataset.images[held_out], size=size, device=torch.device("cpu")).numpy()
    labels = dataset.labels[held_out].numpy()
    probabilities = calibrate(logits, manifest.temperature)[:, 1]
    print(f"{name} {manifest.version} on {len(labels)} held-out images, temperature and threshold cross-fitted")
    for key, metric in with_intervals(all_metrics, labels, *cross_fitted(labels, logits)).items():
        print(f"{key:12} {metric.value:.4f}  95% {metric.low:.4f} to {metric.high:.4f}")
    if csv_path:
        names = [dataset.names[i] for i in held_out]
        write_predictions(csv_path, names, labels, logits.astype(np.float64), probabilities)
        print(f"predictions: {csv_path}")


if __name__ == "__main__":
    main()
