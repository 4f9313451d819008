from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.model.architecture import LesionNet, load_backbone
from tests.app.model.test_architecture import IMAGENET, folded
from tests.conftest import random_model
from training.backbones import build, restore_batch_norm
from training.config import Model
from training.drawn import draw_lesion


def drawn(count: int = 12) -> Tensor:
    return torch.stack(
        [torch.from_numpy(np.array(draw_lesion(n % 2, n, size=(96, 96)))).permute(2, 0, 1) for n in range(count)]
    )


def norms(model: LesionNet) -> list[nn.BatchNorm2d]:
    return [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.inference_mode()
def logits(model: LesionNet, images: Tensor) -> Tensor:
    return torch.as_tensor(model.eval()(images).logits)


def check_restoration(model: LesionNet) -> None:
    before = logits(model, drawn(4))
    restore_batch_norm(model, drawn())
    assert torch.allclose(logits(model, drawn(4)), before, atol=1e-3)
    assert len(norms(model)) == 53
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, x: inputs.update({m: x[0]})) for m in norms(model)]
    logits(model, drawn())
    for hook in hooks:
        hook.remove()
    for layer in norms(model):
        seen = inputs[layer].transpose(0, 1).flatten(1)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert torch.allclose(layer.running_mean, seen.mean(1), atol=1e-3 * float(seen.abs().max()))
        assert torch.allclose(layer.running_var, seen.var(1, correction=0), rtol=1e-2, atol=1e-4)


def test_restoring_folded_batch_norm_leaves_the_logits_and_gives_true_statistics() -> None:
    model = random_model("branch_softmax")
    load_backbone(model, folded(model.trunk.state_dict()))
    check_restoration(model)


@pytest.mark.skipif(not IMAGENET.is_file(), reason=f"no {IMAGENET}")
def test_restoring_the_imagenet_weights_leaves_the_logits() -> None:
    with np.load(IMAGENET, allow_pickle=False) as archive:
        state = {k: torch.from_numpy(archive[k].astype(np.float32)) for k in archive.files}
    model = random_model("branch_softmax")
    load_backbone(model, state)
    check_restoration(model)


def test_a_random_start_is_normalised_and_follows_its_seed() -> None:
    spec = Model(start="random", stride_variant="v1.5", gate="channel_softmax")
    one, same, other = (build(spec, classes=3, seed=s, images=drawn()) for s in (1, 1, 2))
    assert torch.equal(logits(one, drawn(2)), logits(same, drawn(2)))
    assert not torch.equal(logits(one, drawn(2)), logits(other, drawn(2)))
    assert logits(one, drawn(2)).shape == (2, 3)
    assert all(layer.momentum == 0.1 for layer in norms(one))
    assert float(norms(one)[0].running_var.std()) > 0  # type: ignore[union-attr]


def test_building_does_not_touch_the_callers_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(Model(start="random", stride_variant="v1", gate="none"), classes=2, seed=9, images=drawn(2))
    assert torch.equal(torch.rand(1), expected)


def test_a_missing_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"no start weights at .*x\.npz"):
        build(Model(start="x.npz", stride_variant="v1", gate="none"), classes=2, seed=1, images=drawn(2))
