"""The model inside every peer: the same version, either as a user of that peer would write it, or with our engine.

PEER_ENGINE=torch      torch eager in float32, Pillow decodes in full: the usual first version
PEER_ENGINE=openvino   our preprocessing and our OpenVINO engine, so that only the server differs
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MAX_BATCH = 8
Decode = Callable[[bytes], Any]  # image bytes -> one item of a batch
Run = Callable[[Sequence[Any]], list[float]]  # items -> probability of malignant, one an item


def load() -> tuple[Decode, Run]:
    """Decoder and model that PEER_ENGINE names, of the current version."""
    from app.model import store

    version = store.load(ROOT / "model_store", "asff-resnet50", store.current(ROOT / "model_store", "asff-resnet50"))
    return _torch(version) if os.environ.get("PEER_ENGINE", "torch") == "torch" else _openvino(version)


def _torch(version: Any) -> tuple[Decode, Run]:
    import torch
    from PIL import Image
    from torchvision.transforms import functional as transforms

    from app.model.architecture import from_version

    model, temperature = from_version(version.manifest, version.weights), version.manifest.temperature

    def decode(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return transforms.pil_to_tensor(image.resize((224, 224), Image.Resampling.BILINEAR))

    def run(items: Sequence[Any]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.stack(list(items))).logits
        found: list[float] = torch.softmax(logits / temperature, dim=1)[:, 1].tolist()
        return found

    return decode, run


def _openvino(version: Any) -> tuple[Decode, Run]:
    from app.engines.base import build_engine
    from app.model.labels import calibrate
    from app.model.preprocess import decode

    precision: Any = os.environ.get("DERMLENS_PRECISION", "auto")
    engine = build_engine("openvino", version, precision=precision)

    def run(items: Sequence[Any]) -> list[float]:
        logits = engine.run(np.stack(items)).logits
        found: list[float] = calibrate(logits, version.manifest.temperature)[:, 1].tolist()
        return found

    crop_frame = version.manifest.preprocessing.crop_frame
    return lambda data: decode(data, crop_frame=crop_frame).pixels, run
