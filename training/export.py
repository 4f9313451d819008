"""Publish a finished run as a version: calibrate, evaluate, write the model card, and make it current.

python -m training.export --run runs/full --version 1 --promote
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from app.model import store
from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD, from_version
from app.model.manifest import Architecture, Manifest, OperatingPoint, Preprocessing, Split
from training import calibrate
from training.checkpoint import CHECKPOINT
from training.config import Config
from training.data import load_dataset
from training.evaluate import all_metrics, predict_logits, with_intervals, write_predictions
from training.model_card import model_card
from training.plots import held_out_figure, history_figure
from training.train import stopped_early

SIZE = 224  # pixels, what the service decodes to
LICENCE = "Apache-2.0 (weights and code); trained on ISIC images, CC-0 and CC-BY-NC"


class Run(NamedTuple):
    config: Config
    history: list[dict[str, float]]
    weights: dict[str, NDArray[np.generic]]  # EMA, as they will be stored


def read_run(run_dir: Path) -> Run:
    """The last epoch's EMA weights of a run, matrices rounded to float16, vectors in float32.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = run_dir / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"no {path}: train first, python -m training.train --config training/configs/full.toml")
    prefix = "ema.module."
    weights: dict[str, NDArray[np.generic]] = {}
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not name.endswith("num_batches_tracked"):
                array = file.get_tensor(key)
                weights[name] = array.astype(np.float16) if array.ndim > 1 else array
    return Run(Config.model_validate_json(header["config"]), json.loads(header["history"]), weights)


def export(run_dir: Path, root: Path, *, name: str, version: str) -> Path:
    """Publish the run in `run_dir` as `root/name/version`; returns the folder.

    The figures are those of the rounded weights on the held-out fold. Temperature and thresholds are fitted on
    that fold too, so the figures that depend on them are cross-fitted within it.

    Raises:
        ValueError: the run is not finished, or has other than two classes.
        VersionExists: versions never change.
    """
    run = read_run(run_dir)
    config = run.config
    if len(run.history) < config.epochs and not stopped_early(run.history, config.optimisation.patience):
        raise ValueError(
            f"{run_dir} has {len(run.history)} of {config.epochs} epochs: run the same training command again"
        )
    if len(config.data.classes) != 2:
        raise ValueError("export calibrates a decision between two classes; this run has another number")
    dataset = load_dataset(config.data, seed=config.seed)
    training, held_out = dataset.split(config.data.held_out_fold)
    fold = f"held-out fold {config.data.held_out_fold} of {config.data.folds}, {len(held_out)} images"
    manifest = Manifest(
        schema_version=1,
        name=name,
        version=version,
        created=datetime.now(UTC).replace(microsecond=0),
        classes=tuple(config.data.classes),
        architecture=Architecture(
            backbone="resnet50",
            stride_variant=config.model.stride_variant,
            gate=None if config.model.gate == "none" else config.model.gate,
        ),
        preprocessing=Preprocessing(size=SIZE, resize="squash-bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        temperature=1.0,
        operating_points={"balanced": OperatingPoint(threshold=0.5, fitted_on="not fitted")},
        metrics={},
        split=Split(
            data=config.data.root,
            folds=config.data.folds,
            held_out_fold=config.data.held_out_fold,
            training_images=len(training),
            held_out_images=len(held_out),
            fingerprint=dataset.fingerprint,
        ),
        training_config=config.model_dump(mode="json"),
        git_commit=_git_commit(),
        licence=LICENCE,
        files={},
    )
    model = from_version(manifest, run.weights).to(memory_format=torch.channels_last)
    logits = predict_logits(model, dataset.images[held_out], size=SIZE, device=torch.device("cpu")).numpy()
    labels = dataset.labels[held_out].numpy()
    fitted = calibrate.fit(labels, logits)
    probabilities, positive = calibrate.cross_fitted(labels, logits)
    manifest = manifest.model_copy(
        update={
            "temperature": fitted.temperature,
            "operating_points": {
                point: OperatingPoint(threshold=threshold, fitted_on=fold)
                for point, threshold in fitted.thresholds.items()
            },
            "metrics": with_intervals(all_metrics, labels, probabilities, positive),
        }
    )
    title = f"{name} {version}, {fold}"
    predictions = run_dir / "held_out_predictions.csv"
    write_predictions(predictions, [dataset.names[i] for i in held_out], labels, logits, probabilities)
    files = {
        store.WEIGHTS: safetensors.numpy.save(run.weights),
        "MODEL_CARD.md": model_card(manifest, run.history).encode(),
        "report/held_out_predictions.csv": predictions.read_bytes(),
        "report/held_out.png": held_out_figure(labels, probabilities, positive, classes=manifest.classes, title=title),
        "report/training.png": history_figure(run.history, title=f"{name} {version}"),
    }
    folder = store.publish(root, manifest, files)
    for key, metric in manifest.metrics.items():
        print(f"{key:12} {metric.value:.4f}  95% {metric.low:.4f} to {metric.high:.4f}")
    return folder


def _git_commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - git from the path
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Publish a run as a version.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<name>")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the next number")
    parser.add_argument("--promote", action="store_true", help="make it the served version")
    options = parser.parse_args(arguments)
    numbers = [int(v) for v in store.versions(options.store, options.name) if v.isdecimal()]
    version = options.version or str(max(numbers, default=0) + 1)
    try:
        folder = export(options.run, options.store, name=options.name, version=version)
        if options.promote:
            store.promote(options.store, options.name, version)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.export: {error}")
    served = "and is current" if options.promote else "but is not current: add --promote"
    print(f"published {folder}, {served}")


if __name__ == "__main__":
    main()
