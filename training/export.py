"""Publish a finished run as a version: calibrate, evaluate, write the report, and make it current.

python -m training.export --run runs/full-fold0 --promote
python -m training.export --run runs/full-all --folds runs/full-fold{0,1,2} --evidence runs/evidence --promote
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import safetensors.numpy

from app.model import store
from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD
from app.model.manifest import (
    SCHEMA_VERSION,
    Abstention,
    Architecture,
    Manifest,
    OperatingPoint,
    Preprocessing,
    Split,
)
from training.calibrate import COVERAGES, Calibration, Judged, cross_fitted, fit, judge
from training.data import load_dataset
from training.evaluate import print_metrics
from training.held_out import (
    SIZE,
    HeldOut,
    measure,
    predict_held_out,
    predictions_csv,
    read_finished,
    refuse_other_images,
)
from training.model_card import licence
from training.report import PREDICTIONS, write_report

LAST_BIAS = "head.fc2.bias"  # what calibration adds to the logits goes into it
EVIDENCE = ("*.csv", "comparison/*.csv", "contact_sheet.png")  # what the report shows beside the held-out figures


def export(
    run_dir: Path,
    root: Path,
    *,
    name: str,
    version: str,
    folds: Sequence[Path] = (),
    evidence: Path | None = None,
) -> Path:
    """Publish the run in `run_dir` as `root/name/version`; returns the folder.

    Args:
        folds: where `run_dir` held out nothing, runs of its recipe that each held out a fold: every figure, and the
            calibration, is of their predictions of what they had not seen.
        evidence: folder of what the other commands measured, copied into the report.

    Raises:
        ValueError: a run is not finished, `folds` are not of its recipe, or the images are not those that it has seen.
        VersionExists: versions never change.
    """
    runs = {path: read_finished(path) for path in (run_dir, *folds)}
    run = runs[run_dir]
    config = run.config
    if config.model.backbone != "resnet50":
        raise ValueError(
            f"{config.model.backbone} is for the comparison: the service serves resnet50, with or without ASFF"
        )
    if config.data.held_out_fold < 0 and not folds:
        raise ValueError(f"{run_dir} held nothing out: give the runs of its folds with --folds")
    for fold in folds:
        if runs[fold].config.with_fold(-1) != config:
            raise ValueError(f"{fold} is not a fold of {run_dir}: its recipe differs")
        if len(runs[fold].history) < config.epochs:
            raise ValueError(f"{fold} ended before its last epoch, which a run that holds nothing out never does")
    dataset = load_dataset(config.data, seed=config.seed)
    for path, trained in runs.items():
        refuse_other_images(path, trained, dataset)
    held_out = predict_held_out(folds or [run_dir])
    home, abroad = held_out.part(extra=False), held_out.part(extra=True)
    classes = tuple(config.data.classes)
    held_out_folds = len(np.unique(home.folds))
    where = f"{len(home.names)} images of {config.data.root}, held out in {held_out_folds} of {config.data.folds} folds"
    fitted = fit(home.labels, home.logits)
    judged = cross_fitted(home.labels, home.logits, folds=home.folds)
    abroad_judged = judge(abroad.logits, fitted)
    home, abroad = (replace(part, logits=part.logits + fitted.bias) for part in (home, abroad))  # as published below
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        version=version,
        created=datetime.now(UTC).replace(microsecond=0),
        classes=classes,
        architecture=Architecture(
            backbone="resnet50",
            stride_variant=config.model.stride_variant,
            gate=None if config.model.gate == "none" else config.model.gate,
        ),
        preprocessing=Preprocessing(
            size=SIZE, resize="squash-bilinear", crop_frame=config.data.crop_frame, mean=IMAGENET_MEAN, std=IMAGENET_STD
        ),
        temperature=fitted.temperature,
        operating_points={k: OperatingPoint(threshold=t, fitted_on=where) for k, t in fitted.thresholds.items()},
        abstention={
            coverage: _abstention(coverage, classes=classes, home=home, judged=judged, fitted=fitted, fitted_on=where)
            for coverage in COVERAGES
        },
        metrics=measure(home.labels, judged),
        external_metrics={config.data.extra: measure(abroad.labels, abroad_judged)} if config.data.extra else {},
        calibrated_on=where,
        split=Split(
            data=config.data.root,
            folds=config.data.folds,
            held_out_fold=config.data.held_out_fold,
            training_images=len(dataset.split(config.data.held_out_fold).training),
            held_out_images=len(home.names),
            fingerprint=dataset.fingerprint,
        ),
        training_config=config.model_dump(mode="json"),
        git_commit=_git_commit(),
        licence=licence([folder for folder in (config.data.root, config.data.extra) if folder]),
        files={},
    )
    files = {}
    if evidence:
        found = [path for pattern in EVIDENCE for path in sorted(evidence.glob(pattern))]
        files = {f"report/{path.relative_to(evidence).as_posix()}": path.read_bytes() for path in found}
    for fold in folds:
        files[f"report/{fold.name}.csv"] = (fold / "metrics.csv").read_bytes()
    files |= {
        store.WEIGHTS: safetensors.numpy.save(
            run.weights | {LAST_BIAS: fitted.bias + run.weights[LAST_BIAS].astype(np.float32)}
        ),
        PREDICTIONS: predictions_csv(
            [(home, judged, config.data.root), (abroad, abroad_judged, config.data.extra or "")], classes
        ),
        "report/history.csv": (run_dir / "metrics.csv").read_bytes(),
    }
    folder = store.publish(root, manifest, files)
    write_report(folder)
    print_metrics(f"{name} {version}: {where}", manifest.metrics)
    return folder


def publish_again(
    manifest: Manifest, files: Mapping[str, bytes], *, into: Path, version: str | None = None, **changes: object
) -> Path:
    """Publish what a version was changed into, and render its report again where it carries predictions.

    Args:
        version: its number; by default the next one of the store `into`.
        changes: of the manifest's fields.

    Raises:
        StoreError.
    """
    if version is None:
        numbers = [int(number) for number in store.versions(into, manifest.name) if number.isdecimal()]
        version = str(max(numbers, default=0) + 1)
    update = {"version": version, "created": datetime.now(UTC).replace(microsecond=0)} | changes
    folder = store.publish(into, manifest.model_copy(update=update), files)
    if PREDICTIONS in files:
        write_report(folder)
    return folder


def _abstention(
    coverage: str, *, classes: tuple[str, ...], home: HeldOut, judged: Judged, fitted: Calibration, fitted_on: str
) -> Abstention:
    members = judged.sets[coverage]
    covered = [float(members[home.labels == kind, kind].mean()) for kind in range(len(classes))]
    return Abstention(
        quantiles=dict(zip(classes, fitted.quantiles[coverage], strict=True)),
        coverage=dict(zip(classes, covered, strict=True)),
        refer_rate=float(judged.referred[coverage].mean()),
        fitted_on=fitted_on,
    )


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
    parser.add_argument("--folds", type=Path, nargs="+", default=[], help="its recipe's runs that held out a fold each")
    parser.add_argument("--evidence", type=Path, help="folder of what compare, robustness and the others measured")
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the next number")
    parser.add_argument("--promote", action="store_true", help="make it the served version")
    options = parser.parse_args(arguments)
    numbers = [int(v) for v in store.versions(options.store, options.name) if v.isdecimal()]
    version = options.version or str(max(numbers, default=0) + 1)
    try:
        folder = export(
            options.run,
            options.store,
            name=options.name,
            version=version,
            folds=options.folds,
            evidence=options.evidence,
        )
        if options.promote:
            store.promote(options.store, options.name, version)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.export: {error}")
    served = "and is current" if options.promote else "but is not current: add --promote"
    print(f"published {folder}, {served}")


if __name__ == "__main__":
    main()
