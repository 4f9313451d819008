"""What test-time augmentation with flips gains on held-out images, and what it costs.

python -m training.tta --version model_store/asff-resnet50/7 --out runs/evidence

Accuracy and ROC-AUC of single answers and of the mean over four flips, with a paired bootstrap interval.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from app.model import store
from app.model.flips import flips, mean_logits
from app.model.labels import calibrate
from app.model.openvino_graph import build_graph
from training.published import load_trained
from training.statistics import RESAMPLES
from training.tables import write_csv

COLUMNS = ("data", "images", "metric", "single", "flips", "difference", "low", "high")


def gains(
    labels: NDArray[np.int64], single: NDArray[np.float64], flipped: NDArray[np.float64], *, threshold: float
) -> list[list[str]]:
    """Metric, both values, and their difference with its 95% interval, for probabilities [N] of class 1."""
    rng = np.random.default_rng(0)
    samples = [np.arange(len(labels)), *(rng.integers(0, len(labels), (RESAMPLES, len(labels))))]
    rows = []
    for name in ("accuracy", "roc_auc"):
        values = []
        for sample in samples:
            mine = labels[sample]
            if len(np.unique(mine)) < 2:
                continue
            if name == "roc_auc":
                values.append([roc_auc_score(mine, p[sample]) for p in (single, flipped)])
            else:
                values.append([((p[sample] >= threshold) == mine).mean() for p in (single, flipped)])
        found = np.array(values)
        change = found[:, 1] - found[:, 0]
        low, high = np.percentile(change[1:], (2.5, 97.5))
        rows.append([name, *(f"{value:.4f}" for value in (*found[0], change[0], low, high))])
    return rows


def study(source: Path) -> list[list[str]]:
    """Rows of `COLUMNS`, for held-out images of each folder.

    Raises:
        StoreError, or ValueError where the data is absent or other data, or the version has other than two classes.
    """
    version, config, dataset = load_trained(source)
    manifest = version.manifest
    if "balanced" not in manifest.operating_points:
        raise ValueError(f"{source} has other than two classes")
    split = dataset.split(manifest.split.held_out_fold)
    graph = ov.Core().compile_model(build_graph(manifest, version.weights), "CPU")
    threshold, rows = manifest.operating_points["balanced"].threshold, []
    for data, members in ((config.data.root, split.held_out), (config.data.extra, split.held_out_extra)):
        single, flipped = [], []
        for image in tqdm(dataset.images[members].numpy(), desc=str(data), unit="img", disable=None):
            logits = graph(np.stack(flips(image)))["logits"]
            single.append(logits[0])
            flipped.append(mean_logits(list(logits)))
        if not single:
            continue
        both = (calibrate(np.stack(logits), manifest.temperature)[:, -1] for logits in (single, flipped))
        found = gains(dataset.labels[members].numpy(), *both, threshold=threshold)
        rows += [[str(data), str(len(members)), *row] for row in found]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.tta", description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=Path, required=True, help="folder of a published version")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="tta.csv goes here")
    options = parser.parse_args(arguments)
    try:
        rows = study(options.version)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.tta: {error}")
    write_csv(options.out / "tta.csv", COLUMNS, rows)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)))
    print(f"done: {options.out / 'tta.csv'}")


if __name__ == "__main__":
    main()
