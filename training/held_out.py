"""What the networks of a recipe say of the images that each of them has not seen: metrics and predictions.csv.

python -m training.held_out --runs runs/clinics-fold{0,1,2} --evidence runs/evidence
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app.model.manifest import Metric
from training.backbones import from_run
from training.calibrate import COVERAGES, Judged, cross_fitted, fit, judge
from training.checkpoint import CHECKPOINT, Run, read_run
from training.data import Dataset, load_dataset
from training.evaluate import (
    Figures,
    Labels,
    add_external,
    all_metrics,
    multiclass_metrics,
    predict_logits,
    print_metrics,
    with_intervals,
)
from training.isic import collections
from training.statistics import auc_with_interval
from training.train import stopped_early

SIZE = 224  # pixels, what the service decodes to
CACHE = "held_out.csv"


@dataclass(frozen=True)
class HeldOut:
    """Images with the logits of a network that was not trained on them."""

    names: list[str]
    labels: Labels  # [N]
    folds: NDArray[np.int64]  # [N]
    extra: NDArray[np.bool_]  # [N], whether from `data.extra`
    logits: NDArray[np.float32]  # [N,K], of the weights as they will be stored

    def part(self, extra: bool) -> "HeldOut":
        """The images of `data.root`, or those of `data.extra`."""
        mine = np.flatnonzero(self.extra == extra)
        names = [self.names[i] for i in mine]
        return HeldOut(names, self.labels[mine], self.folds[mine], self.extra[mine], self.logits[mine])


def predict_held_out(run_dirs: Sequence[Path], *, size: int = SIZE, progress: bool = True) -> HeldOut:
    """Each run's held-out fold by its own network, one after the other; kept beside its checkpoint.

    Args:
        size: pixels that the images are resized to.

    Raises:
        ValueError: a run is missing or unfinished, the runs are not folds of one recipe, or their images are not here.
    """
    runs = [read_finished(run_dir) for run_dir in run_dirs]
    recipes = {run.config.with_fold(0).model_dump_json() for run in runs}
    folds = [run.config.data.held_out_fold for run in runs]
    if len(recipes) > 1 or len(set(folds)) < len(folds) or min(folds) < 0:
        raise ValueError(f"{', '.join(map(str, run_dirs))} are not different folds of one recipe")
    dataset: Dataset | None = None
    parts = []
    for run_dir, run in zip(run_dirs, runs, strict=True):
        cache = run_dir / (CACHE if size == SIZE else f"held_out_{size}.csv")
        if not cache.is_file() or cache.stat().st_mtime < (run_dir / CHECKPOINT).stat().st_mtime:
            dataset = dataset or load_dataset(run.config.data, seed=run.config.seed, progress=progress)
            refuse_other_images(run_dir, run, dataset)
            _write(cache, run_dir, dataset, run.config.data.held_out_fold, size=size)
        parts.append(_read(cache))
    return HeldOut(
        names=[name for part in parts for name in part.names],
        labels=np.concatenate([part.labels for part in parts]),
        folds=np.concatenate([part.folds for part in parts]),
        extra=np.concatenate([part.extra for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
    )


def refuse_other_images(run_dir: Path, run: Run, dataset: Dataset) -> None:
    """Raise ValueError where the images are not those that a run has seen and held out."""
    if run.fingerprints != dataset.fingerprints:
        raise ValueError(
            f"{run_dir} has seen other images than are here now, in other folds: bring them back, or train"
        )


def read_finished(run_dir: Path) -> Run:
    """A run that came to its end.

    Raises:
        ValueError: it is missing, or has epochs to go.
    """
    run = read_run(run_dir)
    if len(run.history) < run.config.epochs and not stopped_early(run.history, run.config.optimisation.patience):
        raise ValueError(
            f"{run_dir} has {len(run.history)} of {run.config.epochs} epochs: run the same training command again"
        )
    return run


def _write(path: Path, run_dir: Path, dataset: Dataset, fold: int, *, size: int) -> None:
    split = dataset.split(fold)
    members = np.concatenate([split.held_out, split.held_out_extra])
    _, model = from_run(run_dir)
    model = model.to(memory_format=torch.channels_last)
    logits = predict_logits(model, dataset.images[members], size=size, device=torch.device("cpu")).numpy()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label", "fold", "extra", *(f"logit_{k}" for k in range(logits.shape[1]))])
        for i, row in zip(members, logits, strict=True):
            values = (f"{value:.9g}" for value in row)  # nine digits give a float32 back exactly
            writer.writerow([dataset.names[i], int(dataset.labels[i]), fold, int(dataset.extra[i]), *values])


def _read(path: Path) -> HeldOut:
    with path.open() as file:
        rows = list(csv.reader(file))[1:]
    return HeldOut(
        names=[row[0] for row in rows],
        labels=np.array([int(row[1]) for row in rows]),
        folds=np.array([int(row[2]) for row in rows]),
        extra=np.array([row[3] == "1" for row in rows]),
        logits=np.array([[float(value) for value in row[4:]] for row in rows], dtype=np.float32),
    )


def predictions_csv(parts: Sequence[tuple[HeldOut, Judged, str]], classes: Sequence[str]) -> bytes:
    """One row an image, of which every figure of the report is computed: (images, answers, name of their folder)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = [*(f"logit_{name}" for name in classes), *(f"probability_{name}" for name in classes)]
    writer.writerow(["name", "label", "source", "fold", *kinds, "decided", *(f"refer_{c}" for c in COVERAGES)])
    for held_out, judged, source in parts:
        referred = judged.referred
        for i, name in enumerate(held_out.names):
            values = (f"{value:.6f}" for value in (*held_out.logits[i], *judged.probabilities[i]))
            flags = (int(referred[coverage][i]) for coverage in COVERAGES)
            writer.writerow([name, held_out.labels[i], source, held_out.folds[i], *values, judged.decided[i], *flags])
    return text.getvalue().encode()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.held_out", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="runs that each held out a fold")
    parser.add_argument("--evidence", type=Path, default=Path("runs/evidence"), help="predictions.csv goes here")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels, where it is not what the service decodes to")
    parser.add_argument("--setting", help="put the figures into external.csv under this name instead")
    options = parser.parse_args(arguments)
    try:
        held_out = predict_held_out(options.runs, size=options.size)
        data = read_run(options.runs[0]).config.data
    except ValueError as error:
        sys.exit(f"training.held_out: {error}")
    home, abroad = held_out.part(extra=False), held_out.part(extra=True)
    parts = [(home, cross_fitted(home.labels, home.logits, folds=home.folds), data.root)]
    if data.extra:
        parts.append((abroad, judge(abroad.logits, fit(home.labels, home.logits)), data.extra))
    for images, judged, source in parts:
        found = Figures(len(images.names), measure(images.labels, judged))
        print_metrics(f"{found.images} images of {source}, held out", found.metrics)
        if options.setting:
            add_external(options.evidence / "external.csv", options.setting, Path(source).name, found)
        if len(data.classes) == 2:
            print_collections(images, judged)
        print(f"referred           {', '.join(f'{c}: {flags.mean():.4f}' for c, flags in judged.referred.items())}")
    if options.setting:
        print(f"done: {options.evidence / 'external.csv'}")
        return
    options.evidence.mkdir(parents=True, exist_ok=True)
    (options.evidence / "predictions.csv").write_bytes(predictions_csv(parts, data.classes))
    print(f"done: {options.evidence / 'predictions.csv'}")


def print_collections(images: HeldOut, judged: Judged) -> None:
    """ROC-AUC within each collection of ISIC 2019 that has images enough of both classes."""
    for name, members in collections(images.names).items():
        auc = auc_with_interval(images.labels[members], judged.probabilities[members, 1])
        if len(auc) == 3:
            print(f"roc_auc, {name:9} {auc[0]:.4f}  95% {auc[1]:.4f} to {auc[2]:.4f}, {members.sum()} images")


def measure(labels: Labels, judged: Judged) -> dict[str, Metric]:
    """Every metric of N judged images, with its interval."""
    if judged.probabilities.shape[1] == 2:
        return with_intervals(all_metrics, labels, judged.probabilities[:, 1], judged.decided == 1)
    return with_intervals(multiclass_metrics, labels, judged.probabilities, judged.decided)


if __name__ == "__main__":
    main()
