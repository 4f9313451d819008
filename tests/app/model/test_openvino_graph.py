from typing import get_args

import numpy as np
import openvino as ov
import pytest
import torch

from app.model.architecture import from_version
from app.model.manifest import Architecture, Gate, Manifest, StrideVariant
from app.model.openvino_graph import build_graph
from tests.conftest import make_manifest, random_model


def random_version(
    gate: Gate | None, stride: StrideVariant = "v1", classes: int = 2
) -> tuple[Manifest, dict[str, np.ndarray]]:
    model = random_model(gate, stride_variant=stride, classes=classes)
    weights = {k: v.numpy() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    names = ("benign", "malignant", "other")[:classes]
    architecture = Architecture(backbone="resnet50", stride_variant=stride, gate=gate)
    return make_manifest(architecture=architecture, classes=names), weights


@pytest.mark.parametrize(
    ("gate", "stride", "classes"),
    [(gate, "v1", 2) for gate in (*get_args(Gate), None)] + [("branch_softmax", "v1.5", 3)],
)
def test_the_graph_is_the_network(gate: Gate | None, stride: StrideVariant, classes: int) -> None:
    manifest, weights = random_version(gate, stride, classes)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    with torch.inference_mode():
        expected = from_version(manifest, weights)(torch.from_numpy(images))
    compiled = ov.Core().compile_model(build_graph(manifest, weights), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(images)
    assert np.allclose(found["logits"], expected.logits, atol=1e-4 * float(expected.logits.abs().max()))
    assert np.allclose(found["cam"], expected.cam, atol=1e-4 * float(expected.cam.abs().max()))


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    manifest, weights = random_version("branch_softmax")
    missing = {k: v for k, v in weights.items() if k != "trunk.layer3.1.conv2.weight"}
    with pytest.raises(ValueError, match=r"do not fit: .*trunk\.layer3\.1\.conv2\.weight"):
        build_graph(manifest, missing)
    with pytest.raises(ValueError, match=r"do not fit: head\.more is unknown"):
        build_graph(manifest, weights | {"head.more": np.zeros(1)})
    with pytest.raises(ValueError, match="do not fit"):
        build_graph(manifest, weights | {"head.fc1.weight": np.zeros((2048, 7), dtype=np.float32)})
