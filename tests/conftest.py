"""Shared by all tests: a published version with random weights, and images drawn from a seed."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import uvicorn
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from app.engines.base import Output
from app.main import create_app
from app.model import metadata, store
from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD, LesionNet
from app.model.manifest import (
    SCHEMA_VERSION,
    Abstention,
    Architecture,
    Gate,
    Manifest,
    MetadataFusion,
    OperatingPoint,
    Preprocessing,
    Split,
)
from app.model.metadata import FIELDS, WIDTH, Fusion
from app.model.overlay import Method
from app.model.store import LoadedVersion
from app.protocol import GuardedProtocol
from app.settings import Settings
from training.drawn import draw_lesion

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("DERMLENS_DATA_DIR", ROOT.parent / "shared" / "data"))
NAME = "asff-resnet50"
JPEG = {"content-type": "image/jpeg"}

needs_real_data = pytest.mark.skipif(
    not (SHARED_DATA / "isic2020" / "train").is_dir(), reason=f"no real images in {SHARED_DATA} (see docs/training.md)"
)


def random_model(gate: Gate | None, *, seed: int = 0, **options: Any) -> LesionNet:
    """A network in eval mode whose batch norm has non-trivial statistics."""
    torch.manual_seed(seed)
    model = LesionNet(gate=gate, stride_variant=options.pop("stride_variant", "v1"), **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def framed(picture: Image.Image) -> Image.Image:
    """The picture as a dermoscope with a round field shows it: a disc that touches its shorter sides, on black."""
    width, height = picture.size
    radius = min(width, height) / 2
    disc = Image.new("L", picture.size)
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    ImageDraw.Draw(disc).ellipse(box, fill=255)
    return Image.composite(picture, Image.new("RGB", picture.size, (6, 4, 8)), disc)


@pytest.fixture(scope="session")
def lesion() -> bytes:
    """A drawn lesion, 320×240 JPEG."""
    return encode(draw_lesion(1, 3, size=(320, 240)), "JPEG", quality=92)


def make_manifest(version: str = "1", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": NAME,
        "version": version,
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "classes": ("benign", "malignant"),
        "architecture": Architecture(backbone="resnet50", stride_variant="v1", gate="branch_softmax"),
        "preprocessing": Preprocessing(size=224, resize="squash-bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        "temperature": 1.5,
        "operating_points": {
            "balanced": OperatingPoint(threshold=0.4, fitted_on="nothing"),
            "sensitivity-95": OperatingPoint(threshold=0.0, fitted_on="nothing"),
            "specificity-95": OperatingPoint(threshold=1.0, fitted_on="nothing"),
        },
        "metrics": {},
        "split": Split(
            data="none", folds=2, held_out_fold=0, training_images=0, held_out_images=0, fingerprint="0" * 64
        ),
        "training_config": {},
        "git_commit": "none",
        "licence": "Apache-2.0",
        "files": {},
    }
    return Manifest(**(fields | changes))


@pytest.fixture(scope="session")
def random_weights() -> bytes:
    state = random_model("branch_softmax").state_dict()
    arrays = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return safetensors.numpy.save({k: v.astype(np.float16) if v.ndim > 1 else v for k, v in arrays.items()})


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes) -> Path:
    """A store whose current version 1 has random weights; read it only."""
    root = tmp_path_factory.mktemp("model_store")
    store.publish(root, make_manifest(), {store.WEIGHTS: random_weights, "MODEL_CARD.md": b"# card\n"})
    store.promote(root, NAME, "1")
    return root


def make_rule(benign: float, malignant: float) -> Abstention:
    """An abstention rule with these quantiles."""
    quantiles = {"benign": benign, "malignant": malignant}
    return Abstention(quantiles=quantiles, coverage=quantiles, refer_rate=0.1, fitted_on="nothing")


@pytest.fixture(scope="session")
def careful_store(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes) -> Path:
    """As `model_store`, at 64 pixels, and it abstains: both classes at 0.90, neither at 0.95, benign alone at 0.99."""
    root = tmp_path_factory.mktemp("careful_store")
    store.publish(root, careful_manifest(), {store.WEIGHTS: random_weights})
    store.promote(root, NAME, "1")
    return root


def careful_manifest(**changes: Any) -> Manifest:
    """That of `careful_store`."""
    small = Preprocessing(size=64, resize="squash-bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    rules = {"0.90": make_rule(0, 0), "0.95": make_rule(1, 1), "0.99": make_rule(0, 1)}
    return make_manifest(preprocessing=small, abstention=rules, **changes)


def random_fusion(*, classes: int = 2) -> Fusion:
    """A head of four units for age, sex and site."""
    rng = np.random.default_rng(0)
    shapes = ((4, classes + WIDTH), (4,), (classes, 4))
    return Fusion(*(rng.normal(0, 1, shape).astype(np.float32) for shape in shapes))


@pytest.fixture(scope="session")
def told_store(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes) -> Path:
    """As `careful_store`, and it takes age, sex and site, by a head of random weights."""
    root = tmp_path_factory.mktemp("told_store")
    about = MetadataFusion(
        experimental=True, fields=FIELDS, trained_on="nothing", held_out="nothing", roc_auc={}, gain={}
    )
    head = safetensors.numpy.save(random_fusion().arrays())
    store.publish(root, careful_manifest(metadata=about), {store.WEIGHTS: random_weights, metadata.FILE: head})
    store.promote(root, NAME, "1")
    return root


@pytest.fixture
def small_store(tmp_path: Path) -> Callable[..., Path]:
    """Publishes tiny versions into a store of the test's own: `small_store("1", "2")`."""

    def publish(*versions: str) -> Path:
        for version in versions:
            weights = safetensors.numpy.save({"w": np.full(4, float(version), dtype=np.float32)})
            store.publish(tmp_path, make_manifest(version), {store.WEIGHTS: weights, "report/a.txt": b"a"})
        return tmp_path

    return publish


class Quick:
    """An engine that answers with the one number that its version's weights hold."""

    name, device, precision, in_flight = "quick", "cpu", "float32", 1

    def __init__(self, version: LoadedVersion) -> None:
        self._value = version.weights["w"][0]

    def run(self, images: NDArray[np.uint8]) -> Output:
        time.sleep(0.002)  # so that batches form, and swaps come in the middle of them
        rows = np.full((len(images), 2), self._value, dtype=np.float32)
        return Output(rows, np.zeros((len(images), 2, 4, 4), dtype=np.float32))

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        raise NotImplementedError


@pytest.fixture
def quick_store(small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Versions 1, which is current, and 2, for servers whose engine is `Quick`."""
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Quick(version))
    root = small_store("1", "2")
    store.promote(root, NAME, "1")
    return root


@contextmanager
def running(app: Any, *, http: type[GuardedProtocol] = GuardedProtocol, loop: Any = "auto") -> Iterator[int]:
    """A server in a thread, by its port."""
    # No logging of uvicorn's, as `dermlens serve` has none: setting it up closes the handlers of others, of absl among
    # them, which closes the stream that pytest captures
    config = uvicorn.Config(app, port=0, log_config=None, log_level="critical", http=http, ws="none", loop=loop)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def client(model_store: Path) -> Iterator[TestClient]:
    settings = Settings(
        model_store=model_store, precision="float32", max_batch=4, max_upload_bytes=2_000_000, max_batch_files=4
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client
