"""`dermlens export`, by the files that it leaves: ONNX Runtime for the network, Triton's own schema for its config."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient
from google.protobuf import text_format  # type: ignore[import-untyped]
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.http import InferInput

from app.engines.torch_engine import TorchEngine
from app.model import store
from app.model.labels import NOTICE, calibrate
from app.model.manifest import Manifest
from app.model.preprocess import decode
from tests.app.test_cli import run
from tests.conftest import JPEG, NAME, ROOT, encode, make_manifest
from training.drawn import draw_lesion
from training.quantize import cam_correlation


@pytest.fixture(autouse=True)
def _small_version(careful_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))


@pytest.fixture(scope="module")
def exported(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version with random weights at full size, as `dermlens export` writes it."""
    path = tmp_path_factory.mktemp("exported") / "new" / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERMLENS_MODEL_STORE", str(model_store))
        assert run("export", "--format", "onnx", "-o", path) == 0
    return path


def test_onnx_runtime_sees_what_the_torch_engine_sees(exported: Path, model_store: Path) -> None:
    session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(uint8)", ["batch", 3, 224, 224])
    loaded = store.load(model_store, NAME, "1")
    engine = TorchEngine(loaded, device="cpu")
    images = np.stack([decode(encode(draw_lesion(seed % 2, seed))).pixels for seed in range(5)])
    for batch in (images[:1], images):
        expected = engine.run(batch)
        logits, cam = session.run(["logits", "cam"], {"image": batch})
        ours, theirs = (calibrate(found, loaded.manifest.temperature) for found in (logits, expected.logits))
        assert np.abs(ours - theirs).max() < 1e-3
        assert cam.shape == (len(batch), 2, 14, 14)
        for target in (0, 1):
            assert cam_correlation(cam[:, target], expected.cam[:, target]).min() > 0.99
    metadata = session.get_modelmeta().custom_metadata_map
    assert Manifest.model_validate_json(metadata["manifest"]) == loaded.manifest


def test_it_writes_the_file_alone_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "-o", tmp_path / "model.onnx", "--version", "1") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'model.onnx'}: {NAME} 1, 127.6 MB, its outputs are the server's within ")
    assert NOTICE in out
    assert len(err.splitlines()) == 2  # steps
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_the_client_in_the_docs_gives_the_servers_answer(
    exported: Path,
    model_store: Path,
    client: TestClient,
    lesion: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ONNX Runtime stands where Triton would: it takes the same tensors under the same names."""
    session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])

    class Triton:
        def __init__(self, _: str) -> None: ...

        def infer(self, model: str, inputs: list[InferInput]) -> SimpleNamespace:
            (image,) = inputs
            assert (model, image.name(), image.shape(), image.datatype()) == (NAME, "image", [1, 3, 224, 224], "UINT8")
            pixels = np.frombuffer(image._get_binary_data(), dtype=np.uint8).reshape(image.shape())
            found = session.run(["logits", "cam"], {"image": pixels})
            return SimpleNamespace(as_numpy=dict(zip(["logits", "cam"], found, strict=True)).get)

    monkeypatch.setattr("tritonclient.http.InferenceServerClient", Triton)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_store").symlink_to(model_store)
    (tmp_path / "lesion.jpg").write_bytes(lesion)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)
    exec(code.replace('"4"', '"1"'), {})  # noqa: S102 - our own page
    answer = client.post("/predict", content=lesion, headers=JPEG).json()
    assert capsys.readouterr().out.startswith(answer["label"])
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.size == (320, 240)


def test_a_triton_repository_has_its_layout_and_a_config_that_triton_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # a second time replaces the file
        assert run("export", "--triton", tmp_path, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert 0 <= told.pop("strayed") < 1e-3
        assert told == {"output": str(tmp_path / NAME / "1" / "model.onnx"), "name": NAME, "version": "1"}
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        f"{NAME}/1/model.onnx",
        f"{NAME}/config.pbtxt",
    ]
    config = text_format.Parse((tmp_path / NAME / "config.pbtxt").read_text(), ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (NAME, "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    session = ort.InferenceSession(tmp_path / NAME / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    for told, there in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        types = type(told[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        found = [(tensor.name, types[tensor.data_type].name, list(tensor.dims)) for tensor in told]
        assert found == [(tensor.name, kinds[tensor.type], tensor.shape[1:]) for tensor in there]
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert (parameters["classes"], parameters["temperature"]) == ("benign,malignant", "1.5")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--version", "9", "-o", "x.onnx"), "no version '9' of asff-resnet50"),
        (("--version", "2b", "--triton", "x"), "Triton knows versions by number, not '2b'"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    tmp_path: Path,
    random_weights: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
) -> None:
    store.publish(tmp_path / "store", make_manifest("2b"), {store.WEIGHTS: random_weights})
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    assert run("export", *options) == 2
    assert f"dermlens: {says}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_without_the_extra_it_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("export", "-o", tmp_path / "x.onnx") == 2
    assert capsys.readouterr().err.endswith("pip install '.[onnx]'\n")


def test_a_file_that_does_not_do_what_the_server_does_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.model.onnx_graph.margins", lambda last: 2 * last)
    assert run("export", "-o", tmp_path / "x.onnx") == 2
    assert "ONNX Runtime strays from the server by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
