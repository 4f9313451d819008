"""The bundled version: it loads, and HTTP agrees with training on real images."""

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from app.engines.base import Precision, build_engine
from app.engines.openvino_engine import computes_bfloat16
from app.main import create_app
from app.model import store
from app.model.labels import calibrate
from app.model.preprocess import decode
from app.settings import Settings
from tests.conftest import NAME, ROOT, SHARED_DATA, needs_real_data
from training.quantize import cam_correlation

STORE = ROOT / "model_store"


def test_the_bundled_version_is_whole_and_good_enough() -> None:
    manifest = store.verify(STORE, NAME, store.current(STORE, NAME))
    assert manifest.metrics["roc_auc"].value >= 0.95
    assert manifest.metrics["accuracy"].value >= 0.88
    assert manifest.split.held_out_images > 500


@needs_real_data
def test_http_and_training_agree_on_fifty_real_images() -> None:
    """What the report was computed with, on images decoded by training, against the server as it is started."""
    from training.evaluate import served_logits

    folder = SHARED_DATA / "isic2020" / "train"
    files = [path.read_bytes() for kind in ("benign", "malignant") for path in sorted((folder / kind).iterdir())[::50]]
    version = store.current(STORE, NAME)
    manifest = store.read_manifest(STORE, NAME, version)
    crop_frame = manifest.preprocessing.crop_frame
    images = torch.from_numpy(np.stack([decode(data, crop_frame=crop_frame).pixels for data in files[:50]]))
    expected = calibrate(served_logits(STORE / NAME / version, images), manifest.temperature)
    with TestClient(create_app(Settings(model_store=STORE, engine="torch"))) as client:
        for data, probabilities in zip(files, expected, strict=False):
            answer = client.post("/predict", files={"file": ("x.jpg", data, "image/jpeg")}).json()
            assert answer["probabilities"]["malignant"] == pytest.approx(probabilities[1], abs=1e-3)
    assert len(expected) == 50


def agreement(precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Of the bundled version on real images: difference in probability from torch [N], correlation of the maps [N]."""
    loaded = store.load(STORE, NAME, store.current(STORE, NAME))
    folder = SHARED_DATA / "isic2020" / "train"
    paths = [path for kind in ("benign", "malignant") for path in sorted((folder / kind).iterdir())[7::60]]
    crop_frame = loaded.manifest.preprocessing.crop_frame
    images = np.stack([decode(path.read_bytes(), crop_frame=crop_frame).pixels for path in paths])
    expected = build_engine("torch", loaded).run(images)
    engine = build_engine("openvino", loaded, precision=precision)
    batches = [engine.run(images[start : start + 8]) for start in range(0, len(images), 8)]
    logits = np.concatenate([batch.logits for batch in batches])
    moved = calibrate(logits, loaded.manifest.temperature) - calibrate(expected.logits, loaded.manifest.temperature)
    maps = np.concatenate([batch.cam for batch in batches])
    return np.abs(moved[:, 1]), cam_correlation(maps[:, 1], expected.cam[:, 1])


@needs_real_data
def test_openvino_in_float32_agrees_with_torch() -> None:
    moved, likeness = agreement("float32")
    assert moved.max() < 1e-3
    assert likeness.min() > 0.9999


@needs_real_data
@pytest.mark.skipif(not computes_bfloat16(), reason="this processor does not compute in bfloat16")
def test_openvino_in_bfloat16_agrees_with_torch() -> None:
    moved, likeness = agreement("bfloat16")
    assert moved.max() < 2e-2
    assert likeness.min() > 0.99


@needs_real_data
def test_openvino_in_int8_strays_about_as_far_as_the_manifest_says() -> None:
    """Twice as far is let through: these are other images, and processors round and saturate in their own ways."""
    found = store.read_manifest(STORE, NAME, store.current(STORE, NAME)).quantization
    assert found is not None
    assert found.shipped
    moved, likeness = agreement("int8")
    assert moved.max() <= 2 * found.probability_difference["max"]
    assert np.median(moved) < 0.02
    assert np.median(likeness) > 0.98
