import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam
from torch import Tensor, nn

from app.model import store
from app.model.architecture import LesionNet, fold_batch_norm, from_version, load_backbone
from app.model.manifest import Gate, StrideVariant
from tests.conftest import NAME, ROOT, SHARED_DATA, make_manifest, random_model

GATES: list[Gate | None] = ["channel_softmax", "branch_softmax", None]
IMAGENET = SHARED_DATA.parent / "pretrained" / "resnet50_v1_imagenet.npz"


def images(batch: int, size: int = 224) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def captum_cam(model: LesionNet, batch: Tensor, target: int) -> Tensor:
    """captum's Grad-CAM of the logit difference on the map that the head pools."""

    def difference(x: Tensor) -> Tensor:
        logits = model(x).logits
        return torch.as_tensor(logits[:, target] - logits[:, 1 - target])

    layer = model.fusion if model.fusion is not None else model.trunk.layer4
    return torch.as_tensor(LayerGradCam(difference, layer).attribute(batch.float(), relu_attributions=False))[:, 0]


def assert_cam_is_captums(model: LesionNet) -> None:
    batch = images(2)
    with torch.no_grad():
        cam = model(batch).cam
    for target in (0, 1):
        expected = captum_cam(model, batch, target).detach()
        assert (cam[:, target] - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert expected.abs().max() > 0


@pytest.mark.parametrize("gate", GATES)
def test_cam_equals_captum_with_random_weights(gate: Gate | None) -> None:
    assert_cam_is_captums(random_model(gate))


@pytest.mark.parametrize("gate", ["channel_softmax", "branch_softmax"])
def test_cam_equals_captum_with_trained_weights(gate: Gate) -> None:
    root = ROOT / "model_store"
    loaded = store.load(root, NAME, store.current(root, NAME))
    architecture = loaded.manifest.architecture.model_copy(update={"gate": gate})
    weights = dict(loaded.weights)
    if gate != loaded.manifest.architecture.gate:  # the trained trunk and head under the other gate
        rows = 1024 if gate == "channel_softmax" else 2048
        for part in ("weight", "bias"):
            trained = weights[f"fusion.excite.{part}"]
            weights[f"fusion.excite.{part}"] = np.resize(trained, (rows, *trained.shape[1:]))
    assert_cam_is_captums(from_version(loaded.manifest.model_copy(update={"architecture": architecture}), weights))


def test_cam_with_three_classes_is_grad_cam_against_the_mean_of_the_others() -> None:
    model = random_model("branch_softmax", classes=3)
    fused = model.forward_features(images(1)).detach().requires_grad_()
    output = model.head(fused)
    (gradient,) = torch.autograd.grad(output.logits[0, 1] - output.logits[0, [0, 2]].mean(), fused)
    expected = (gradient * fused).sum(dim=1).detach()
    assert torch.allclose(output.cam[:, 1], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("gate", GATES)
def test_output_shapes(gate: Gate | None) -> None:
    output = random_model(gate)(images(3))
    side = 14 if gate else 7
    assert output.logits.shape == (3, 2)
    assert output.cam.shape == (3, 2, side, side)
    assert output.logits.dtype == output.cam.dtype == torch.float32


def test_projecting_then_resizing_equals_resizing_then_projecting() -> None:
    fusion = random_model("branch_softmax").fusion
    assert fusion is not None
    conv5 = torch.randn(2, 2048, 7, 7, generator=torch.Generator().manual_seed(2))
    before = F.interpolate(fusion.project(conv5), size=(14, 14), mode="bilinear", align_corners=False)
    after = fusion.project(F.interpolate(conv5, size=(14, 14), mode="bilinear", align_corners=False))
    assert (before - after).abs().max() <= 1e-5 * after.abs().max()


@pytest.mark.parametrize("gate", GATES)
def test_batch_neighbours_do_not_change_a_result(gate: Gate | None) -> None:
    model = random_model(gate)
    batch = images(5)
    with torch.inference_mode():
        together, alone = model(batch), model(batch[2:3])
    assert torch.allclose(together.logits[2:3], alone.logits, rtol=1e-4, atol=1e-5)
    assert (together.cam[2:3] - alone.cam).abs().max() <= 1e-4 * alone.cam.abs().max()


def test_channel_gate_sums_to_one_over_channels_and_branch_gate_lies_between() -> None:
    f1, f2 = torch.rand(2, 1024, 4, 4), torch.rand(2, 1024, 4, 4)
    for gate in ("channel_softmax", "branch_softmax"):
        fusion = random_model(gate).fusion
        assert fusion is not None
        a = fusion.weights(f1, f2)
        assert a.shape == (2, 1024)
        assert bool(((a > 0) & (a < 1)).all())
        assert torch.allclose(a.sum(dim=1), torch.ones(2), atol=1e-4) == (gate == "channel_softmax")


def test_the_gate_weighs_the_branches() -> None:
    fusion = random_model("branch_softmax").fusion
    assert fusion is not None
    nn.init.zeros_(fusion.excite.weight)
    bias = torch.zeros(2, 1024)
    bias[0, :512], bias[1, 512:] = 50, 50  # first half: conv4 alone; second half: projected conv5 alone
    fusion.excite.bias.data = bias.flatten()
    conv4, conv5 = torch.rand(1, 1024, 4, 4), torch.rand(1, 2048, 4, 4)
    fused = fusion(conv4, conv5)
    assert torch.allclose(fused[:, :512], conv4[:, :512], atol=1e-5)
    assert torch.allclose(fused[:, 512:], fusion.project(conv5)[:, 512:], atol=1e-5)


def torchvision_conv5(net: nn.Module, normalised: Tensor) -> Tensor:
    body = nn.Sequential(*list(net.children())[:-2])
    return torch.as_tensor(body(normalised))


@pytest.mark.parametrize("variant", ["v1", "v1.5"])
def test_torchvisions_state_dict_loads_and_v15_computes_the_same(variant: StrideVariant) -> None:
    net = torchvision.models.resnet50(weights=None).eval()
    model = random_model(None, stride_variant=variant)
    load_backbone(model, net.state_dict())
    batch = images(1)
    normalised = (batch.float() - model.mean) / model.std
    with torch.inference_mode():
        same = torch.allclose(model.forward_features(batch), torchvision_conv5(net, normalised), atol=1e-4)
    assert same == (variant == "v1.5")


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision state with every batch norm folded into the convolution before it; only biases remain."""
    result = {k: v for k, v in state.items() if "bn" not in k and "downsample" not in k}
    for name in [k.removesuffix(".running_mean") for k in state if k.endswith("running_mean")]:
        conv = name.replace("bn", "conv") if "bn" in name else name.replace("downsample.1", "downsample.0")
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5).sqrt()
        result[f"{conv}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
        result[f"{name}.bias"] = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
    return result


def test_a_state_with_folded_batch_norm_loads_and_computes_the_same() -> None:
    model = random_model(None)
    batch = images(1)
    with torch.inference_mode():
        expected = model.forward_features(batch)
        other = copy.deepcopy(model)
        load_backbone(other, folded(model.trunk.state_dict()))
        assert torch.allclose(other.forward_features(batch), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


@pytest.mark.skipif(not IMAGENET.is_file(), reason=f"no {IMAGENET}")
def test_the_imagenet_weights_on_this_machine_load_and_know_a_feature_from_noise() -> None:
    with np.load(IMAGENET, allow_pickle=False) as archive:
        state = {k: torch.from_numpy(archive[k].astype(np.float32)) for k in archive.files}
    model = random_model(None)
    load_backbone(model, state)
    with torch.inference_mode():
        features = model.forward_features(images(2))
    assert bool(torch.isfinite(features).all())
    assert 0.02 < float((features > 0).float().mean()) < 0.9


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    state = torchvision.models.resnet50(weights=None).state_dict()
    del state["layer3.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"first layer3\.0\.conv1\.weight"):
        load_backbone(random_model(None), state)


def test_weights_of_another_architecture_are_refused(model_store: Path) -> None:
    weights = store.load(model_store, NAME, "1").weights
    plain = make_manifest().architecture.model_copy(update={"gate": None})
    with pytest.raises(ValueError, match="do not fit"):
        from_version(make_manifest(architecture=plain), weights)


@pytest.mark.parametrize("gate", ["branch_softmax", None])
def test_folding_batch_norm_changes_nothing_but_the_layers(gate: Gate | None) -> None:
    model = random_model(gate)
    folded = fold_batch_norm(copy.deepcopy(model))
    with torch.inference_mode():
        expected, found = model(images(2)), folded(images(2))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
