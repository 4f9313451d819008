import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD, from_version
from app.model.labels import NOTICE
from app.model.manifest import Gate, Manifest, Preprocessing, StrideVariant
from app.model.onnx_graph import IR_VERSION, OPSET, build_onnx
from tests.app.model.test_openvino_graph import random_version

SMALL = Preprocessing(size=64, resize="squash-bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)


@pytest.mark.parametrize(
    ("gate", "stride", "classes"), [("channel_softmax", "v1", 2), (None, "v1", 2), ("branch_softmax", "v1.5", 3)]
)
def test_the_graph_is_the_network(gate: Gate | None, stride: StrideVariant, classes: int) -> None:
    manifest, weights = random_version(gate, stride, classes)
    model = build_onnx(manifest.model_copy(update={"preprocessing": SMALL}), weights)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    with torch.inference_mode():
        expected = from_version(manifest, weights)(torch.from_numpy(images))
    logits, cam = session.run(["logits", "cam"], {"image": images})
    assert np.allclose(logits, expected.logits, atol=1e-4 * float(expected.logits.abs().max()))
    assert np.allclose(cam, expected.cam, atol=1e-4 * float(expected.cam.abs().max()))


def test_the_file_is_of_an_old_onnx_and_says_what_it_is() -> None:
    manifest, weights = random_version("branch_softmax")
    model = build_onnx(manifest, weights)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(found.domain, found.version) for found in model.opset_import]) == (
        IR_VERSION,
        [("", OPSET)],
    )
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert (told["name"], told["version"], told["notice"]) == (manifest.name, manifest.version, NOTICE)
    assert (json.loads(told["classes"]), float(told["temperature"])) == (["benign", "malignant"], manifest.temperature)
    assert Manifest.model_validate_json(told["manifest"]) == manifest


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    manifest, weights = random_version("branch_softmax")
    missing = {k: v for k, v in weights.items() if k != "trunk.layer3.1.conv2.weight"}
    with pytest.raises(ValueError, match=r"do not fit: .*trunk\.layer3\.1\.conv2\.weight"):
        build_onnx(manifest, missing)
    with pytest.raises(ValueError, match=r"do not fit: head\.more is unknown"):
        build_onnx(manifest, weights | {"head.more": np.zeros(1)})
