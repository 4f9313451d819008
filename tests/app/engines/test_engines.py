import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engines import base
from app.engines.base import EngineUnavailable, build_engine, warm_up
from app.engines.torch_engine import AT_ONCE, TorchEngine
from app.model import store
from app.model.architecture import LesionNet, Output, from_version
from app.model.overlay import Method
from app.model.preprocess import decode
from app.model.store import LoadedVersion
from tests.conftest import NAME, encode
from training.drawn import draw_lesion


@pytest.fixture(scope="module")
def loaded(model_store: Path) -> LoadedVersion:
    return store.load(model_store, NAME, "1")


def test_the_engine_gives_what_the_network_gives(loaded: LoadedVersion) -> None:
    engine = build_engine("torch", loaded)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 224, 224), dtype=np.uint8)
    output = engine.run(images)
    with torch.inference_mode():
        expected = from_version(loaded.manifest, loaded.weights)(torch.from_numpy(images))
    assert np.allclose(output.logits, expected.logits, atol=1e-4)
    assert np.allclose(output.cam, expected.cam, atol=1e-4 * float(expected.cam.abs().max()))
    assert output.features is not None
    assert np.allclose(output.features, expected.features, atol=1e-4 * float(expected.features.abs().max()))
    assert output.logits.dtype == output.cam.dtype == output.features.dtype == np.float32


@pytest.mark.parametrize("driver", [True, False])
def test_auto_takes_the_cpu_where_there_is_no_gpu(
    loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr("app.engines.base.nvidia_driver", lambda: driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = build_engine("auto", loaded)
    assert (engine.name, engine.device) == ("openvino", "cpu")
    with pytest.raises(EngineUnavailable, match="use auto"):
        build_engine("cuda", loaded)


def test_auto_takes_cuda_where_there_is_one(loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LoadedVersion] = []
    monkeypatch.setattr("app.engines.base.nvidia_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("app.engines.cuda_engine.CudaEngine", built.append)
    build_engine("auto", loaded)
    build_engine("cuda", loaded, precision="auto")
    assert built == [loaded, loaded]
    with pytest.raises(EngineUnavailable, match="float16"):
        build_engine("auto", loaded, precision="int8")
    assert build_engine("torch", loaded).device == "cpu"
    assert build_engine("openvino", loaded).device == "cpu"


def test_torch_has_one_precision(loaded: LoadedVersion) -> None:
    with pytest.raises(EngineUnavailable, match="float32"):
        build_engine("torch", loaded, precision="bfloat16")


@pytest.mark.parametrize("in_flight", [1, 3])
def test_warm_up_runs_every_batch_size_as_often_at_once_as_there_may_be(in_flight: int) -> None:
    shapes, together = [], threading.Barrier(in_flight)

    class Watched:
        def __init__(self) -> None:
            self.in_flight = in_flight

        def run(self, images: np.ndarray) -> base.Output:
            together.wait(timeout=10)
            shapes.append(images.shape)
            return base.Output(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2, 1, 1), np.float32))

    warm_up(Watched(), size=224, max_batch=3)  # type: ignore[arg-type]  # a stand-in that only watches
    assert shapes == [(batch, 3, 224, 224) for batch in (1, 2, 3) for _ in range(in_flight)]


@pytest.fixture(scope="module")
def engine(loaded: LoadedVersion) -> TorchEngine:
    return TorchEngine(loaded, device="cpu")


@pytest.fixture(scope="module")
def network(loaded: LoadedVersion) -> LesionNet:
    return from_version(loaded.manifest, loaded.weights)


PIXELS = decode(encode(draw_lesion(1, 3)), size=64, max_pixels=10**6).pixels
FLAT = np.broadcast_to(PIXELS.mean(axis=(1, 2), keepdims=True, dtype=np.float32), PIXELS.shape)


@torch.inference_mode()
def margin(network: LesionNet, pixels: np.ndarray) -> float:
    """Malignant logit less benign logit."""
    logits = network(torch.from_numpy(pixels.astype(np.float32))[None]).logits[0]
    return float(logits[1] - logits[0])


def test_integrated_gradients_sum_to_what_the_image_has_above_its_mean_colour(
    engine: TorchEngine, network: LesionNet
) -> None:
    whole = margin(network, PIXELS) - margin(network, FLAT)
    maps = [engine.attribute(PIXELS, "integrated-gradients", target=target) for target in (0, 1)]
    assert maps[1].shape == (8, 8)
    assert maps[1].dtype == np.float32
    assert maps[1].sum() == pytest.approx(whole, rel=0.05)
    assert np.allclose(maps[0], -maps[1], atol=1e-5 * np.abs(maps[1]).max())


def test_occlusion_is_the_mean_loss_over_the_windows_that_cover_a_cell(engine: TorchEngine, network: LesionNet) -> None:
    loss, covered = np.zeros((4, 4)), np.zeros((4, 4))
    for row in range(3):
        for column in range(3):
            hidden = PIXELS.astype(np.float32)
            window = (slice(None), slice(16 * row, 16 * row + 32), slice(16 * column, 16 * column + 32))
            hidden[window] = FLAT[window]
            cells = (slice(row, row + 2), slice(column, column + 2))
            loss[cells] += margin(network, PIXELS) - margin(network, hidden)
            covered[cells] += 1
    found = engine.attribute(PIXELS, "occlusion", target=1)
    assert found.dtype == np.float32
    assert np.allclose(found, loss / covered, atol=1e-4 * np.abs(loss).max())


def test_gradcam_as_an_attribution_is_the_cam(engine: TorchEngine) -> None:
    cam = engine.run(PIXELS[None]).cam[0]
    assert np.array_equal(engine.attribute(PIXELS, "gradcam", target=1), cam[1])


class DarkBlock(torch.nn.Module):
    """Its malignant logit is the darkness of the 16×16 block in row 1, column 2, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> Output:
        self.batches.append(len(images))
        dark = 255 - images[:, :, 16:32, 32:48].mean(dim=(1, 2, 3))
        logits = torch.stack([torch.zeros_like(dark), dark], dim=1)
        return Output(logits, torch.zeros(len(images), 2, 4, 4), dark[:, None])


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion"])
def test_the_evidence_is_found_where_it_is_a_few_copies_at_a_time(
    loaded: LoadedVersion, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    seen = DarkBlock()
    monkeypatch.setattr("app.engines.torch_engine.from_version", lambda *_: seen)
    image = np.full((3, 64, 64), 200, dtype=np.uint8)
    image[:, 16:32, 32:48] = 20
    found = TorchEngine(loaded, device="cpu").attribute(image, method, target=1)
    cell = 64 // len(found)
    evidence = np.zeros((64, 64), dtype=bool)
    evidence[16:32, 32:48] = True
    inside = evidence[::cell, ::cell]
    assert found[inside].min() > 10
    if method == "integrated-gradients":
        assert np.abs(found[~inside]).max() < 1e-3
    else:  # its windows are wider than the block: they spill into the next cells, and no further
        assert found.max() == pytest.approx(found[inside].min())
        assert not found[:, 0].any()
        assert not found[3].any()
    assert max(seen.batches) <= AT_ONCE
