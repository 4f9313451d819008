"""The network of `architecture.py` as an ONNX model, straight from the stored arrays, for servers of others.

As in `openvino_graph.py` batch norm is folded into the convolutions, and torch is not imported: its exporter takes tens
of seconds and binds the file to a newer ONNX than this one needs.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from app.model.labels import NOTICE
from app.model.manifest import Gate, Manifest
from app.model.openvino_graph import BLOCKS, Weights, margins, normalisation, take, take_folded

OPSET, IR_VERSION = 13, 7  # ONNX 1.8, of 2020: what runs ONNX at all reads it
PLANE = [2, 3]  # height and width among the axes of an image

Input = str | NDArray[Any]  # another operation's output, or a constant


class _Graph:
    """Operations in the order in which they run, and the constants that they take."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: Input, name: str = "", **attributes: Any) -> str:
        """Append an operation; returns the name of its output."""
        name = name or f"{kind}.{len(self.nodes)}"
        taken = [value if isinstance(value, str) else self.constant(value, name) for value in inputs]
        self.nodes.append(helper.make_node(kind, taken, [name], name=name, **attributes))
        return name

    def constant(self, value: NDArray[Any], user: str) -> str:
        """Append a constant; returns its name."""
        name = f"{user}.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def build_onnx(manifest: Manifest, weights: Mapping[str, NDArray[np.generic]]) -> onnx.ModelProto:
    """Input `image` uint8[B,3,S,S] RGB, B free; outputs `logits` float32[B,K] and `cam` float32[B,K,S/16,S/16].

    Without a gate, the plain baseline, the map is [B,K,S/32,S/32]. What `labels.judge` needs goes with the file, in its
    metadata: the whole manifest, and by themselves name, version, classes, temperature and notice.

    Raises:
        ValueError: the weights do not fit the architecture that the manifest names.
    """
    left = dict(weights)  # every array is taken out where it is used
    size, gate, classes = manifest.preprocessing.size, manifest.architecture.gate, len(manifest.classes)
    side = size // (32 if gate is None else 16)
    graph = _Graph()
    try:
        conv4, conv5 = _trunk(graph, left, manifest)
        features = conv5 if gate is None else _fuse(graph, conv4, conv5, left, gate)
        _head(graph, features, left, side=side)
    except KeyError as error:
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit: no {error}") from None
    if left:
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit: {min(left)} is unknown")
    tensor = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"{manifest.name}-{manifest.version}",
            [tensor("image", TensorProto.UINT8, ["batch", 3, size, size])],
            [
                tensor("logits", TensorProto.FLOAT, ["batch", classes]),
                tensor("cam", TensorProto.FLOAT, ["batch", classes, side, side]),
            ],
            graph.constants,
            doc_string=NOTICE,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="dermlens",
    )
    helper.set_model_props(
        model,
        {
            "name": manifest.name,
            "version": manifest.version,
            "classes": json.dumps(manifest.classes),
            "temperature": str(manifest.temperature),
            "notice": NOTICE,
            "manifest": manifest.model_dump_json(),
        },
    )
    return model


def _trunk(graph: _Graph, left: Weights, manifest: Manifest) -> tuple[str, str]:
    mean, std = normalisation(manifest)
    x = graph.add("Cast", "image", to=TensorProto.FLOAT)
    x = graph.add("Div", graph.add("Sub", x, mean), std)
    x = graph.add("Relu", _conv_bn(graph, x, left, "trunk.conv1", "trunk.bn1", stride=2, padding=3))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    stages = []
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (stride, 1) if manifest.architecture.stride_variant == "v1" else (1, stride)
            x = _bottleneck(graph, x, left, f"trunk.layer{stage}.{block}", strides=strides)
        stages.append(x)
    return stages[2], stages[3]


def _bottleneck(graph: _Graph, x: str, left: Weights, name: str, *, strides: tuple[int, int]) -> str:
    """A residual block; `strides` of its first 1×1 and its 3×3 convolution."""
    y = graph.add("Relu", _conv_bn(graph, x, left, f"{name}.conv1", f"{name}.bn1", stride=strides[0]))
    y = graph.add("Relu", _conv_bn(graph, y, left, f"{name}.conv2", f"{name}.bn2", stride=strides[1], padding=1))
    y = _conv_bn(graph, y, left, f"{name}.conv3", f"{name}.bn3")
    if f"{name}.downsample.0.weight" in left:
        x = _conv_bn(graph, x, left, f"{name}.downsample.0", f"{name}.downsample.1", stride=max(strides))
    return graph.add("Relu", graph.add("Add", y, x))


def _conv_bn(graph: _Graph, x: str, left: Weights, conv: str, norm: str, *, stride: int = 1, padding: int = 0) -> str:
    return graph.add("Conv", x, *take_folded(left, conv, norm), name=conv, strides=[stride, stride], pads=[padding] * 4)


def _fuse(graph: _Graph, conv4: str, conv5: str, left: Weights, gate: Gate) -> str:
    """`AdaptiveFusion`: a·F1 + (1−a)·F2."""
    projected = graph.add("Conv", conv5, *_take_linear(left, "fusion.project"))
    scales = np.array([1, 1, 2, 2], dtype=np.float32)  # conv5 has half the side of conv4
    f2 = graph.add("Resize", projected, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    pooled = graph.add("Concat", _pool(graph, conv4), _pool(graph, f2), axis=1)
    squeezed = graph.add("Gemm", pooled, *_take_linear(left, "fusion.squeeze"), transB=1)
    scores = graph.add("Gemm", graph.add("Relu", squeezed), *_take_linear(left, "fusion.excite"), transB=1)
    if gate == "channel_softmax":
        a = graph.add("Softmax", scores, axis=1)
    else:
        branches = graph.add("Softmax", graph.add("Reshape", scores, np.array([0, 2, -1])), axis=1)
        a = graph.add("Gather", branches, np.array(0), axis=1)
    a = graph.add("Unsqueeze", a, np.array(PLANE))
    rest = graph.add("Sub", np.array([1], dtype=np.float32), a)
    return graph.add("Add", graph.add("Mul", a, conv4), graph.add("Mul", rest, f2))


def _head(graph: _Graph, features: str, left: Weights, *, side: int) -> None:
    """`PooledHead`: logits, and Grad-CAM in closed form."""
    (w1, b1), (w2, b2) = _take_linear(left, "head.fc1"), _take_linear(left, "head.fc2")
    both = graph.constant(w1, "head.fc1")  # of its two uses
    hidden = graph.add("Gemm", _pool(graph, features), both, b1, transB=1)
    graph.add("Gemm", graph.add("Relu", hidden), w2, b2, transB=1, name="logits")
    active = graph.add("Cast", graph.add("Greater", hidden, np.array([0], dtype=np.float32)), to=TensorProto.FLOAT)
    gradient = graph.add("MatMul", graph.add("Mul", graph.add("Unsqueeze", active, np.array([1])), margins(w2)), both)
    flat = graph.add("Reshape", features, np.array([0, 0, side * side]))
    cam = graph.add("Div", graph.add("MatMul", gradient, flat), np.array([side * side], dtype=np.float32))
    graph.add("Reshape", cam, np.array([0, 0, side, side]), name="cam")


def _pool(graph: _Graph, x: str) -> str:
    return graph.add("ReduceMean", x, axes=PLANE, keepdims=0)


def _take_linear(left: Weights, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return take(left, f"{name}.weight"), take(left, f"{name}.bias")
