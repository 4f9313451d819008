from pathlib import Path

import numpy as np
import pytest
import torch

from app.engines.base import EngineUnavailable, build_engine, warm_up
from app.model import store
from app.model.architecture import from_version
from app.model.store import LoadedVersion
from tests.conftest import NAME


@pytest.fixture(scope="module")
def loaded(model_store: Path) -> LoadedVersion:
    return store.load(model_store, NAME, "1")


def test_the_engine_gives_what_the_network_gives(loaded: LoadedVersion) -> None:
    engine = build_engine("torch", loaded, threads=0)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 224, 224), dtype=np.uint8)
    output = engine.run(images)
    with torch.inference_mode():
        expected = from_version(loaded.manifest, loaded.weights)(torch.from_numpy(images))
    assert np.allclose(output.logits, expected.logits, atol=1e-4)
    assert np.allclose(output.cam, expected.cam, atol=1e-4 * float(expected.cam.abs().max()))
    assert output.logits.dtype == output.cam.dtype == np.float32


def test_auto_takes_the_cpu_where_there_is_no_gpu(loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert build_engine("auto", loaded, threads=0).device == "cpu"
    with pytest.raises(EngineUnavailable, match="use auto"):
        build_engine("cuda", loaded, threads=0)


def test_auto_takes_cuda_where_there_is_one(loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "app.engines.torch_engine.TorchEngine", lambda _, device, threads: asked.append((device, threads))
    )
    build_engine("auto", loaded, threads=3)
    build_engine("torch", loaded, threads=0)
    assert asked == [("cuda", 3), ("cpu", 0)]


def test_warm_up_runs_the_smallest_and_the_largest_batch(loaded: LoadedVersion) -> None:
    engine, sizes = build_engine("torch", loaded, threads=0), []
    run = engine.run

    class Watched:
        name, device = engine.name, engine.device

        def run(self, images: np.ndarray) -> object:
            sizes.append(images.shape)
            return run(images)

    warm_up(Watched(), size=224, max_batch=3)  # type: ignore[arg-type]  # a stand-in that only watches
    assert sizes == [(1, 3, 224, 224), (3, 3, 224, 224)]
