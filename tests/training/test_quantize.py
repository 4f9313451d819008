from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from app.engines.openvino_engine import OpenVinoEngine
from app.model import store
from app.model.manifest import Preprocessing
from app.model.store import LoadedVersion
from tests.conftest import NAME, make_manifest
from training import quantize
from training.config import load_config
from training.data import load_dataset
from training.quantize import Answers, cam_correlation, compare, main

SMOKE = Path(__file__).parent.parent.parent / "training" / "configs" / "smoke.toml"


def answers(margin: list[float], maps: np.ndarray | None = None) -> Answers:
    logits = np.array([[-m, m] for m in margin], dtype=np.float32)
    cam = np.random.default_rng(0).normal(size=(len(margin), 2, 4, 4)) if maps is None else maps
    return Answers(logits, cam.astype(np.float32))


LABELS = np.array([0, 0, 0, 1, 1, 1])
FLOAT = answers([-2, -1, -0.5, 0.5, 1, 2])


def test_the_same_answers_cost_nothing_and_ship() -> None:
    found = compare(make_manifest(), FLOAT, FLOAT, LABELS)
    assert found.shipped
    assert found.float32 == found.int8 == {"roc_auc": 1.0, "accuracy": 1.0}
    assert found.probability_difference == {"median": 0, "p99": 0, "max": 0}
    assert found.cam_correlation["min"] == pytest.approx(1)


def test_a_lost_decision_is_seen_and_does_not_ship() -> None:
    found = compare(make_manifest(), FLOAT, answers([-2, -1, -0.5, 0.5, 1, -0.9]), LABELS)
    assert found.int8["accuracy"] == pytest.approx(5 / 6)
    assert found.int8["roc_auc"] < 0.9
    assert found.probability_difference["max"] > 0.5
    assert not found.shipped


def test_gaining_is_no_reason_not_to_ship() -> None:
    assert compare(make_manifest(), answers([-2, -1, -0.5, 0.5, 1, -0.9]), FLOAT, LABELS).shipped


def test_correlation_ignores_scale_and_offset_and_sees_a_turned_map() -> None:
    maps = np.random.default_rng(1).normal(size=(3, 5, 5)).astype(np.float32)
    assert np.allclose(cam_correlation(maps, 3 * maps + 1), 1)
    assert np.allclose(cam_correlation(maps, -maps), -1)


@pytest.fixture
def smoke_store(tmp_path: Path, random_weights: bytes) -> Path:
    """A version at 64 pixels that says it was trained on the drawn images of smoke.toml."""
    config = load_config(SMOKE)
    dataset = load_dataset(config.data, seed=config.seed, progress=False)
    manifest = make_manifest(
        training_config=config.model_dump(mode="json"),
        split=make_manifest().split.model_copy(update={"fingerprint": dataset.fingerprint}),
    )
    assert manifest.preprocessing == Preprocessing(
        size=224, resize="squash-bilinear", mean=manifest.preprocessing.mean, std=manifest.preprocessing.std
    )
    store.publish(tmp_path, manifest, {store.WEIGHTS: random_weights, "report/a.txt": b"a"})
    store.promote(tmp_path, NAME, "1")
    return tmp_path


def test_a_version_is_published_again_with_its_int8_graph(
    smoke_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["trunk.conv1", "trunk.layer2.1.conv2"]
    monkeypatch.setattr(quantize, "CALIBRATION_IMAGES", 8)
    monkeypatch.setattr(quantize, "most_sensitive", lambda *_: kept)
    monkeypatch.setattr(quantize, "MOST_LOST", {"roc_auc": 1.0, "accuracy": 1.0})  # random weights decide at random
    main(["--store", str(smoke_store), "--promote"])
    assert "published" in capsys.readouterr().out
    assert store.current(smoke_store, NAME) == "2"
    loaded = store.load(smoke_store, NAME, "2")
    found = loaded.manifest.quantization
    assert found is not None
    assert found.shipped
    assert set(loaded.manifest.files) == {store.WEIGHTS, "report/a.txt", *store.INT8}
    config = load_config(SMOKE)
    images = load_dataset(config.data, seed=config.seed, progress=False).images[::5].numpy()
    engine = OpenVinoEngine(loaded, precision="int8")
    ours, theirs = engine.run(images), OpenVinoEngine(loaded, precision="float32").run(images)
    assert ours.logits.shape == theirs.logits.shape
    # Random weights take rounding worse than trained ones: 0.25 here
    assert 0 < np.abs(ours.logits - theirs.logits).max() < 0.5 * np.abs(theirs.logits).max()
    assert np.array_equal(ours.logits.argmax(axis=1), theirs.logits.argmax(axis=1))
    graph = ov.Core().read_model(*loaded.int8 or ())
    convolutions = [op for op in graph.get_ops() if op.get_type_name() == "Convolution"]
    inputs = {op.get_friendly_name(): op.input_value(0).get_node().get_type_name() for op in convolutions}
    assert inputs["trunk.layer1.0.conv2"] == "FakeQuantize"
    assert all(inputs[name] != "FakeQuantize" for name in kept)


def test_the_most_sensitive_convolution_is_the_one_that_rounding_hurts(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.arange(-127, 128, dtype=np.float32).reshape(1, -1, 1, 1)  # its 255 levels are whole numbers
    spoilt = exact.copy()
    spoilt[0, 0] = 40_000  # one weight takes nearly all the levels
    version = LoadedVersion(
        make_manifest(), {"trunk.a.weight": exact, "trunk.b.weight": spoilt, "trunk.c.weight": exact / 3}
    )
    # A network whose logits are its weights
    monkeypatch.setattr(quantize, "build_graph", lambda _, weights: weights)
    nothing = np.zeros(1, dtype=np.float32)
    monkeypatch.setattr(
        quantize,
        "run",
        lambda graph, _: Answers(np.concatenate([w.ravel() for w in graph.values()]).astype(np.float32), nothing),
    )
    monkeypatch.setattr(quantize, "KEPT", 1)
    assert quantize.most_sensitive(version, np.zeros((1, 3, 2, 2), dtype=np.uint8)) == ["trunk.b"]


def test_a_version_that_lost_too_much_goes_without(
    smoke_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "CALIBRATION_IMAGES", 4)
    monkeypatch.setattr(quantize, "most_sensitive", lambda *_: [])
    monkeypatch.setattr(quantize, "MOST_LOST", {"roc_auc": -2.0, "accuracy": -2.0})  # nothing is good enough
    main(["--store", str(smoke_store)])
    assert "without int8" in capsys.readouterr().out
    loaded = store.load(smoke_store, NAME, "2")
    assert loaded.int8 is None
    assert loaded.manifest.quantization is not None
    assert not loaded.manifest.quantization.shipped


def test_other_images_than_it_was_trained_on_are_refused(smoke_store: Path, random_weights: bytes) -> None:
    config = load_config(SMOKE).model_dump(mode="json")
    store.publish(smoke_store, make_manifest("7", training_config=config), {store.WEIGHTS: random_weights})
    with pytest.raises(SystemExit, match="trained on other images"):
        main(["--store", str(smoke_store), "--version", "7"])
