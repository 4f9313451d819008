"""The network of `architecture.py` as an OpenVINO graph, straight from the stored arrays: no torch, no conversion.

Batch norm is folded into the convolutions. The map of the evidence is an output of the same graph.
"""

from collections.abc import Mapping

import numpy as np
import openvino as ov
import openvino.opset13 as op
from numpy.typing import NDArray
from openvino import Node

from app.model.manifest import Gate, Manifest

EPS = 1e-5  # of torch's BatchNorm2d
BLOCKS = (3, 4, 6, 3)  # of ResNet-50's four stages
PLANE = np.array([2, 3])  # height and width among the axes of an image

Weights = dict[str, NDArray[np.generic]]


def build_graph(manifest: Manifest, weights: Mapping[str, NDArray[np.generic]]) -> ov.Model:
    """Input uint8[B,3,S,S] RGB, B free; outputs `logits` float32[B,K], `cam` float32[B,K,S/16,S/16] and
    `features` float32[B,1024].

    Without a gate, the plain baseline, the map is [B,K,S/32,S/32] and the features are 2048.

    Raises:
        ValueError: the weights do not fit the architecture that the manifest names.
    """
    left = dict(weights)  # every array is taken out where it is used
    size, gate = manifest.preprocessing.size, manifest.architecture.gate
    images = op.parameter(ov.PartialShape([-1, 3, size, size]), ov.Type.u8, name="images")
    try:
        conv4, conv5 = _trunk(images, left, manifest)
        features = conv5 if gate is None else _fuse(conv4, conv5, left, gate, side=size // 16)
        outputs = _head(features, left)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit: {error}") from None
    if left:
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit: {min(left)} is unknown")
    return ov.Model(outputs, [images], f"{manifest.name}-{manifest.version}")


def _trunk(images: Node, left: Weights, manifest: Manifest) -> tuple[Node, Node]:
    mean, std = normalisation(manifest)
    x = op.divide(op.subtract(op.convert(images, ov.Type.f32), mean), std)
    x = op.relu(_conv_bn(x, left, "trunk.conv1", "trunk.bn1", stride=2, padding=3))
    x = op.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    stages = []
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (stride, 1) if manifest.architecture.stride_variant == "v1" else (1, stride)
            x = _bottleneck(x, left, f"trunk.layer{stage}.{block}", strides=strides)
        stages.append(x)
    return stages[2], stages[3]


def _bottleneck(x: Node, left: Weights, name: str, *, strides: tuple[int, int]) -> Node:
    """A residual block; `strides` of its first 1×1 and its 3×3 convolution."""
    y = op.relu(_conv_bn(x, left, f"{name}.conv1", f"{name}.bn1", stride=strides[0]))
    y = op.relu(_conv_bn(y, left, f"{name}.conv2", f"{name}.bn2", stride=strides[1], padding=1))
    y = _conv_bn(y, left, f"{name}.conv3", f"{name}.bn3")
    if f"{name}.downsample.0.weight" in left:
        x = _conv_bn(x, left, f"{name}.downsample.0", f"{name}.downsample.1", stride=max(strides))
    return op.relu(op.add(y, x))


def _conv_bn(x: Node, left: Weights, conv: str, norm: str, *, stride: int = 1, padding: int = 0) -> Node:
    kernel, shift = take_folded(left, conv, norm)
    pads = [padding, padding]
    y = op.convolution(x, kernel, [stride, stride], pads, pads, [1, 1], name=conv)
    return op.add(y, shift.reshape(1, -1, 1, 1))


def _fuse(conv4: Node, conv5: Node, left: Weights, gate: Gate, *, side: int) -> Node:
    """`AdaptiveFusion`: a·F1 + (1−a)·F2."""
    projected = op.convolution(conv5, take(left, "fusion.project.weight"), [1, 1], [0, 0], [0, 0], [1, 1])
    projected = op.add(projected, take(left, "fusion.project.bias").reshape(1, -1, 1, 1))
    f2 = op.interpolate(
        projected,
        np.array([side, side]),
        "linear_onnx",
        "sizes",
        coordinate_transformation_mode="half_pixel",
        axes=PLANE,
    )
    pooled = op.concat([op.reduce_mean(conv4, PLANE), op.reduce_mean(f2, PLANE)], 1)
    scores = _linear(op.relu(_linear(pooled, left, "fusion.squeeze")), left, "fusion.excite")
    if gate == "channel_softmax":
        a = op.softmax(scores, 1)
    else:
        branches = op.reshape(scores, np.array([0, 2, -1]), special_zero=True)
        a = op.gather(op.softmax(branches, 1), np.array(0), np.array(1))
    a = op.unsqueeze(a, PLANE)
    return op.add(op.multiply(a, conv4), op.multiply(op.subtract(np.float32(1), a), f2))


def _head(features: Node, left: Weights) -> list[ov.Output]:
    """`PooledHead`: logits, Grad-CAM in closed form, and the pooled features."""
    w1, w2 = take(left, "head.fc1.weight"), take(left, "head.fc2.weight")
    pooled = op.reduce_mean(features, PLANE)
    hidden = op.add(op.matmul(pooled, w1, False, True), take(left, "head.fc1.bias"))
    logits = op.add(op.matmul(op.relu(hidden), w2, False, True), take(left, "head.fc2.bias"))
    active = op.unsqueeze(op.convert(op.greater(hidden, np.float32(0)), ov.Type.f32), np.array(1))
    gradient = op.matmul(op.multiply(active, margins(w2)), w1, False, False, name="cam.gradient")  # [B,K,C]
    height, width = (features.get_output_partial_shape(0)[axis].get_length() for axis in (2, 3))
    flat = op.reshape(features, np.array([0, 0, height * width]), special_zero=True)
    cam = op.divide(op.matmul(gradient, flat, False, False, name="cam.map"), np.float32(height * width))
    cam = op.reshape(cam, np.array([0, 0, height, width]), special_zero=True)
    return [_named(logits, "logits"), _named(cam, "cam"), _named(pooled, "features")]


def _linear(x: Node, left: Weights, name: str) -> Node:
    return op.add(op.matmul(x, take(left, f"{name}.weight"), False, True), take(left, f"{name}.bias"))


def normalisation(manifest: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation [1,3,1,1] of pixels of 0 to 255."""
    mean, std = (
        255 * np.array(values, dtype=np.float32).reshape(1, 3, 1, 1)
        for values in (manifest.preprocessing.mean, manifest.preprocessing.std)
    )
    return mean, std


def take(left: Weights, name: str) -> NDArray[np.float32]:
    """An array, which is `left` no more; raises KeyError."""
    return left.pop(name).astype(np.float32)


def take_folded(left: Weights, conv: str, norm: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Kernel [O,I,H,W] and shift [O] of a convolution with the batch norm behind it."""
    scale = take(left, f"{norm}.weight") / np.sqrt(take(left, f"{norm}.running_var") + EPS)
    shift = take(left, f"{norm}.bias") - scale * take(left, f"{norm}.running_mean")
    return take(left, f"{conv}.weight") * scale[:, None, None, None], shift


def margins(w2: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows [K,C] of the last layer, each less the mean of the others: what argues for a class over those."""
    return np.asarray(w2 - (w2.sum(axis=0) - w2) / (len(w2) - 1))


def _named(node: Node, name: str) -> ov.Output:
    output = node.output(0)
    output.set_names({name})
    return output
