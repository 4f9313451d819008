"""Publish a version again with an int8 graph for OpenVINO beside its float weights, if it answers closely enough.

python -m training.quantize --version 7 --promote

NNCF's post-training quantisation, calibrated on training images of the version's own split. The arithmetic of the map
stays in float32, and so do the few convolutions whose rounding disturbs the answer most. Accuracy and agreement with
float32 are measured on the held-out images and recorded in the manifest; where int8 loses more than `MOST_LOST`, the
new version goes without it.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from tqdm import tqdm

from app.model import store
from app.model.labels import calibrate
from app.model.manifest import Comparison, Manifest
from app.model.openvino_graph import build_graph
from app.model.store import LoadedVersion
from training.data import Dataset
from training.evaluate import all_metrics
from training.export import publish_again
from training.published import load_trained

CALIBRATION_IMAGES = 300
SENSITIVITY_IMAGES = 48
KEPT = 8  # convolutions in float32: with 3 of them version 7 lost 0.6 points of accuracy, with 8 of them 0.2
MOST_LOST = {"roc_auc": 0.002, "accuracy": 0.004}
BATCH = 16

Images = NDArray[np.uint8]


class Answers(NamedTuple):
    logits: NDArray[np.float32]  # [N,K]
    cam: NDArray[np.float32]  # [N,K,H,W]


def run(graph: ov.Model, images: Images) -> Answers:
    """Answers in float32, or int8 where the graph says so, for uint8[N,3,S,S]."""
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    parts = [compiled(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return Answers(*(np.concatenate([part[name] for part in parts]) for name in ("logits", "cam")))


def most_sensitive(version: LoadedVersion, images: Images) -> list[str]:
    """The `KEPT` convolutions of the trunk whose weights, rounded to 8 bits a row, alone move the logits most."""
    reference = run(build_graph(version.manifest, version.weights), images).logits
    moved = {}
    kernels = [name for name, array in version.weights.items() if name.startswith("trunk.") and array.ndim == 4]
    for name in tqdm(sorted(kernels), desc="sensitivity", unit="layer", disable=None):
        kernel = version.weights[name].astype(np.float32)
        step = np.maximum(np.abs(kernel).max(axis=(1, 2, 3), keepdims=True) / 127, 1e-12)
        weights = {**version.weights, name: np.round(kernel / step) * step}
        logits = run(build_graph(version.manifest, weights), images).logits
        moved[name.removesuffix(".weight")] = float(np.square(logits - reference).mean())
    return sorted(moved, key=lambda name: -moved[name])[:KEPT]


def quantise(version: LoadedVersion, images: Images, *, kept: list[str]) -> ov.Model:
    """The int8 graph, calibrated on uint8[N,3,S,S]; the convolutions in `kept` stay in float32."""
    import nncf  # seconds to import
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return nncf.quantize(
        build_graph(version.manifest, version.weights),
        nncf.Dataset(list(images[:, None])),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=["cam.gradient", "cam.map", *kept]),
        # The default, a mean of each image's extremes, clips what few images have: one moved by 0.5 in probability
        advanced_parameters=AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        ),
    )


def compare(manifest: Manifest, float32: Answers, int8: Answers, labels: NDArray[np.int64]) -> Comparison:
    """What int8 changes, on held-out images [N]."""
    probabilities = [calibrate(answers.logits, manifest.temperature) for answers in (float32, int8)]
    figures = [_figures(manifest, p, labels) for p in probabilities]
    moved = np.abs(probabilities[0][:, -1] - probabilities[1][:, -1])
    likeness = cam_correlation(float32.cam[:, -1], int8.cam[:, -1])
    lost = {name: figures[0][name] - figures[1][name] for name in figures[0]}
    return Comparison(
        images=len(labels),
        float32=figures[0],
        int8=figures[1],
        probability_difference=_spread(moved, {"median": 0.5, "p99": 0.99, "max": 1}),
        cam_correlation=_spread(likeness, {"median": 0.5, "p01": 0.01, "min": 0}),
        shipped=all(lost[name] <= MOST_LOST[name] for name in lost),
    )


def cam_correlation(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Pearson correlation [N] of two maps [N,H,W] of each image."""
    a, b = (maps.reshape(len(maps), -1).astype(np.float64) for maps in (ours, theirs))
    a, b = (maps - maps.mean(axis=1, keepdims=True) for maps in (a, b))
    return np.asarray((a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1)))


def _figures(manifest: Manifest, probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    point = manifest.operating_points.get("balanced")
    if point is None:
        return {"accuracy": float((probabilities.argmax(axis=1) == labels).mean())}
    positive = probabilities[:, 1]
    measured = all_metrics(labels, positive, positive >= point.threshold)
    return {name: measured[name] for name in MOST_LOST}


def _spread(values: NDArray[Any], quantiles: dict[str, float]) -> dict[str, float]:
    return {name: float(np.quantile(values, at)) for name, at in quantiles.items()}


def serialised(graph: ov.Model) -> Iterator[tuple[str, bytes]]:
    """The two files of an OpenVINO model under their names in a version."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        ov.save_model(graph, path, compress_to_fp16=True)
        yield from zip(store.INT8, (path.read_bytes(), path.with_suffix(".bin").read_bytes()), strict=True)


def publish_quantised(source: Path, root: Path, *, version: str) -> Comparison:
    """Publish the version in folder `source` as `root/<name>/version` with its int8 graph, where that is good enough.

    Raises:
        StoreError: the source is damaged, or the new version exists.
        ValueError: the data that it was trained on is not here, or is other data.
    """
    loaded, config, dataset = load_trained(source)
    manifest = loaded.manifest
    training, held_out = _images(dataset, config.data.held_out_fold)
    kept = most_sensitive(loaded, training[:SENSITIVITY_IMAGES])
    print(f"in float32 stay {', '.join(kept)}")
    files = dict(serialised(quantise(loaded, training, kept=kept)))
    # What is stored is compared: its other constants are float16
    stored = ov.Core().read_model(*(files[name] for name in store.INT8))
    images = dataset.images[held_out].numpy()
    float32 = run(build_graph(manifest, loaded.weights), images)
    found = compare(manifest, float32, run(stored, images), dataset.labels[held_out].numpy())
    rest = {file: (source / file).read_bytes() for file in manifest.files if file not in store.INT8}
    files = rest | (files if found.shipped else {})
    publish_again(manifest, files, into=root, version=version, quantization=found)
    return found


def _images(dataset: Dataset, fold: int) -> tuple[Images, NDArray[np.int64]]:
    """Calibration images drawn from the training folds, and the indices of what was held out."""
    split = dataset.split(fold)
    count = min(CALIBRATION_IMAGES, len(split.training))
    drawn = np.random.default_rng(0).choice(split.training, count, replace=False)
    if not len(split.held_out):
        raise ValueError("the version held nothing out: there is nothing to compare int8 on")
    return dataset.images[drawn].numpy(), split.held_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the current one")
    parser.add_argument("--into", type=Path, help="publish into this store instead")
    parser.add_argument("--promote", action="store_true", help="make the new version the served one")
    options = parser.parse_args(arguments)
    into = options.into or options.store
    numbers = [int(v) for root in (options.store, into) for v in store.versions(root, options.name) if v.isdecimal()]
    version = str(max(numbers, default=0) + 1)
    try:
        source = options.store / options.name / (options.version or store.current(options.store, options.name))
        found = publish_quantised(source, into, version=version)
        if options.promote:
            store.promote(into, options.name, version)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.quantize: {error}")
    for name, value in found.float32.items():
        print(f"{name:24} float32 {value:.4f}  int8 {found.int8[name]:.4f}")
    for name, spread in (
        ("probability difference", found.probability_difference),
        ("map correlation", found.cam_correlation),
    ):
        print(f"{name:24} {'  '.join(f'{key} {value:.4f}' for key, value in spread.items())}")
    shipped = "with int8" if found.shipped else "without int8, which lost more than " + str(MOST_LOST)
    print(f"published {into / options.name / version} {shipped}")


if __name__ == "__main__":
    main()
