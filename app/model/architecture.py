"""ASFF ResNet-50 and its plain baseline: trunk -> fusion -> pooled head with a forward-only Grad-CAM.

Source: arXiv 2510.03876, "Skin Lesion Classification Based on ResNet-50 Enhanced With Adaptive Spatial
Feature Fusion". The class-activation map is an output of the forward pass, see `PooledHead.explain`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import Bottleneck, resnet50

from app.model.manifest import Gate, Manifest, StrideVariant

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Output(NamedTuple):
    """What a forward pass gives; a tuple, so that exporters see plain outputs."""

    logits: Tensor  # float32[B,K]
    cam: Tensor  # float32[B,K,H,W], signed, before ReLU and normalisation
    features: Tensor  # float32[B,C], what the head sees: the mean of the explained map


class Trunk(nn.Module):
    """ResNet-50 under torchvision's parameter names, returning its last two stages.

    `v1` puts the stride of a stage into its first 1×1 convolution, as Keras does; `v1.5` into the 3×3
    convolution, as torchvision does.
    """

    def __init__(self, stride_variant: StrideVariant) -> None:
        super().__init__()
        net = resnet50(weights=None)
        if stride_variant == "v1":
            for stage in (net.layer2, net.layer3, net.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float[B,3,H,W] -> conv4 float[B,1024,H/16,W/16], conv5 float[B,2048,H/32,W/32]."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        conv4 = self.layer3(self.layer2(self.layer1(x)))
        return conv4, self.layer4(conv4)


class AdaptiveFusion(nn.Module):
    """Gated sum of conv4 and conv5 (paper, section 3): `a·F1 + (1−a)·F2`, one weight per channel.

    `channel_softmax` is the authors' code: a softmax over the 1024 channels, so `a` averages 1/1024.
    `branch_softmax` is a softmax between the two branches in each channel, so `a` averages near 1/2.
    """

    def __init__(self, gate: Gate, *, channels: int = 1024) -> None:
        super().__init__()
        self.gate = gate
        self.project = nn.Conv2d(2 * channels, channels, kernel_size=1)
        self.squeeze = nn.Linear(2 * channels, channels)
        self.excite = nn.Linear(channels, channels if gate == "channel_softmax" else 2 * channels)

    def weights(self, f1: Tensor, f2: Tensor) -> Tensor:
        """`a` float[B,C], each in 0..1, from the two float[B,C,H,W] branches."""
        pooled = torch.cat([f1.mean(dim=(2, 3)), f2.mean(dim=(2, 3))], dim=1)
        scores: Tensor = self.excite(F.relu(self.squeeze(pooled)))
        if self.gate == "channel_softmax":
            return scores.softmax(dim=1)
        return scores.view(len(scores), 2, -1).softmax(dim=1)[:, 0]

    def forward(self, conv4: Tensor, conv5: Tensor) -> Tensor:
        """float[B,1024,H,W] and float[B,2048,H/2,W/2] -> float[B,1024,H,W]."""
        # A 1×1 convolution commutes exactly with bilinear resizing: projecting first is a quarter of the work.
        f2 = F.interpolate(self.project(conv5), size=conv4.shape[-2:], mode="bilinear", align_corners=False)
        a = self.weights(conv4, f2)[:, :, None, None]
        return a * conv4 + (1 - a) * f2


class PooledHead(nn.Module):
    """GAP -> Linear -> ReLU -> Linear, and the Grad-CAM of its input in closed form."""

    def __init__(self, channels: int, *, hidden: int = 2048, classes: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, features: Tensor) -> Output:
        """float[B,C,H,W] -> logits, for each class its signed class-activation map, and the pooled features."""
        pooled = features.mean(dim=(2, 3))
        hidden = self.fc1(pooled)
        return Output(self.fc2(F.relu(hidden)), self.explain(features, hidden), pooled)

    @torch.no_grad()
    def explain(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Grad-CAM (arXiv 1610.02391) of `logit_c − mean of the other logits`, without a backward pass.

        The gradient through GAP is the same at every position, `g_c = W1ᵀ((u>0) ⊙ (w2_c − w2_other))/(H·W)`, so
        `cam_c = Σ_k g_c,k F_k` is Grad-CAM, and HiResCAM too. With two classes the target is the logit difference.
        """
        w2 = self.fc2.weight
        others = (w2.sum(dim=0) - w2) / (w2.shape[0] - 1)
        active = (hidden > 0).to(w2.dtype)
        gradient = (active[:, None, :] * (w2 - others)) @ self.fc1.weight  # [B,K,C]
        height, width = features.shape[-2:]
        cam = torch.bmm(gradient, features.flatten(2)) / (height * width)
        return cam.view(len(cam), -1, height, width)


class LesionNet(nn.Module):
    """The served network: `uint8[B,3,224,224]` RGB in, `Output` (two classes, 14×14 map) out.

    With `gate=None` it is the plain ResNet-50 baseline: same head on conv5, 7×7 map. Training may pass
    float images in 0..255 of any size divisible by 32.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        gate: Gate | None,
        stride_variant: StrideVariant,
        classes: int = 2,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.trunk = Trunk(stride_variant)
        self.fusion = AdaptiveFusion(gate) if gate else None
        self.head = PooledHead(1024 if gate else 2048, classes=classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images in 0..255 -> the map that is pooled and explained, float[B,1024,14,14]."""
        conv4: Tensor
        conv5: Tensor
        conv4, conv5 = self.trunk((images.to(self.mean.dtype) - self.mean) / self.std)
        if self.fusion is None:
            return conv5
        fused: Tensor = self.fusion(conv4, conv5)
        return fused

    def forward(self, images: Tensor) -> Output:
        output: Output = self.head(self.forward_features(images))
        return output


def fold_batch_norm(model: LesionNet) -> LesionNet:
    """The same function without batch norm, each folded into the convolution before it; for eval mode alone."""
    for block in (model.trunk, *(m for m in model.trunk.modules() if isinstance(m, Bottleneck))):
        names = [n for n, m in block.named_children() if isinstance(m, nn.BatchNorm2d)]
        for name in names:
            conv = name.replace("bn", "conv")
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, name)))
            setattr(block, name, nn.Identity())
        if (shortcut := getattr(block, "downsample", None)) is not None:
            block.downsample = nn.Sequential(fuse_conv_bn_eval(shortcut[0], shortcut[1]))
    return model


def load_backbone(model: LesionNet, state: Mapping[str, Tensor]) -> None:
    """Load ImageNet weights under torchvision's ResNet-50 names into the trunk; the classifier is ignored.

    A state whose batch norm was folded into its convolutions carries `bn*.bias` alone: such layers get scale 1,
    mean 0 and variance 1 − eps, which leaves the function unchanged (`training.backbones.restore_batch_norm`
    then gives them statistics to train with).

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    folded = {}
    for name, module in model.trunk.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" not in state:
            folded[f"{name}.weight"] = torch.ones_like(module.weight)
            folded[f"{name}.running_mean"] = torch.zeros_like(module.weight)
            folded[f"{name}.running_var"] = torch.full_like(module.weight, 1 - module.eps)
    found = {k: v for k, v in state.items() if not k.startswith("fc.")} | folded
    expected = {k: v for k, v in model.trunk.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(set(found) - set(model.trunk.state_dict()) | set(expected) - set(found)) or [
        k for k, v in expected.items() if found[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(f"not a torchvision ResNet-50 state: {len(wrong)} tensors do not fit, first {wrong[0]}")
    model.trunk.load_state_dict(found, strict=False)


def from_version(manifest: Manifest, weights: Mapping[str, NDArray[np.generic]]) -> LesionNet:
    """The network of a published version in float32 and eval mode.

    Raises:
        ValueError: the weights do not fit the architecture that the manifest names.
    """
    model = LesionNet(
        gate=manifest.architecture.gate,
        stride_variant=manifest.architecture.stride_variant,
        classes=len(manifest.classes),
        mean=manifest.preprocessing.mean,
        std=manifest.preprocessing.std,
    )
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items()}
    try:
        incomplete = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit: {error}") from None
    missing = [k for k in incomplete.missing_keys if not k.endswith("num_batches_tracked")]
    if missing or incomplete.unexpected_keys:
        first = (missing + incomplete.unexpected_keys)[0]
        raise ValueError(f"the weights of {manifest.name} {manifest.version} do not fit its architecture: {first}")
    return model.eval()
