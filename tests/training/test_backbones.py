from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import get_model

from app.model.architecture import LesionNet, load_backbone
from app.model.preprocess import decode
from tests.app.model.test_architecture import IMAGENET, folded
from tests.conftest import ROOT, SHARED_DATA, needs_real_data, random_model
from training.backbones import CHANNELS, build, from_run, network, restore_batch_norm
from training.checkpoint import CHECKPOINT, Fingerprints, save_checkpoint
from training.config import Config, Model, Phase, load_config
from training.drawn import draw_lesion
from training.train import parameter_groups, set_trainable

TRAINING = SHARED_DATA / "isic2020" / "train"


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
    one, same, other = (build(spec, classes=("a", "b", "c"), seed=s, images=drawn()) for s in (1, 1, 2))
    assert torch.equal(logits(one, drawn(2)), logits(same, drawn(2)))
    assert not torch.equal(logits(one, drawn(2)), logits(other, drawn(2)))
    assert logits(one, drawn(2)).shape == (2, 3)
    assert all(layer.momentum == 0.1 for layer in norms(one))
    assert float(norms(one)[0].running_var.std()) > 0  # type: ignore[union-attr]


def test_building_does_not_touch_the_callers_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(
        Model(start="random", stride_variant="v1", gate="none"),
        classes=("benign", "malignant"),
        seed=9,
        images=drawn(2),
    )
    assert torch.equal(torch.rand(1), expected)


def test_a_missing_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"no start weights at .*x\.npz"):
        build(
            Model(start="x.npz", stride_variant="v1", gate="none"),
            classes=("benign", "malignant"),
            seed=1,
            images=drawn(2),
        )


def other(backbone: str, start: str = "random") -> Model:
    return Model.model_validate({"backbone": backbone, "start": start, "stride_variant": "v1", "gate": "none"})


def save_start(path: Path, backbone: str) -> dict[str, Tensor]:
    """A start as ../shared/DATA.md describes them: torchvision's names, float16 convolutions; returns what it holds."""
    torch.manual_seed(3)
    state = {f"features.{k}": v for k, v in get_model(backbone, weights=None).features.state_dict().items()}
    state = {k: v.half().float() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    np.savez(path, **{k: v.half().numpy() if v.ndim == 4 else v.numpy() for k, v in state.items()})
    return state


@pytest.mark.parametrize("backbone", CHANNELS)
def test_another_backbone_keeps_the_contract_of_the_network(backbone: str) -> None:
    torch.manual_seed(0)
    model = network(other(backbone), classes=3).eval()
    images = drawn(2)
    with torch.inference_mode():
        features = model.forward_features(images)
        output = model(images)
    assert features.shape[1] == CHANNELS[backbone]
    assert output.logits.shape == (2, 3)
    assert output.cam.shape == (2, 3, *features.shape[2:])
    assert torch.equal(logits(model, images.float()), output.logits)
    # The map is Grad-CAM by autograd, as for ResNet-50
    leaf = features.clone().requires_grad_()
    scores = model.head(leaf).logits[:, 0]
    others = model.head(leaf).logits[:, 1:].mean(dim=1)
    (gradient,) = torch.autograd.grad((scores - others).sum(), leaf)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)
    assert float(expected.abs().max()) > 0
    assert torch.allclose(output.cam[:, 0], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backbone", CHANNELS)
def test_the_stages_are_all_of_torchvisions_features_in_their_order(backbone: str) -> None:
    torch.manual_seed(0)
    model = network(other(backbone), classes=2).eval()
    assert [name for name, _ in model.trunk.named_children()] == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    reference = get_model(backbone, weights=None).eval()
    state = {k.split(".", 1)[1]: v for k, v in model.trunk.state_dict().items()}
    reference.features.load_state_dict(state)
    normalised = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = reference.features(normalised)
        # torchvision's DenseNet has its last ReLU in `forward`
        expected = expected.relu() if backbone == "densenet169" else expected
        assert torch.allclose(model.trunk(normalised)[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["alexnet", "squeezenet1_1"])
def test_a_random_start_without_batch_norm_keeps_the_signal(backbone: str) -> None:
    model = build(other(backbone), classes=("benign", "malignant"), seed=1, images=drawn())
    same = build(other(backbone), classes=("benign", "malignant"), seed=1, images=drawn())
    assert torch.equal(logits(model, drawn(2)), logits(same, drawn(2)))
    with torch.inference_mode():
        # Variance is kept on average over draws; torchvision's own start leaves AlexNet 0.02
        assert 0.2 < float(model.trunk(torch.randn(4, 3, 96, 96))[1].square().mean()) < 20


@pytest.mark.parametrize("backbone", ["densenet169", "mobilenet_v2"])
def test_a_start_fills_another_backbone_and_frozen_stages_stay(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step in batch norm's frozen mode: what the phase freezes and every running statistic stay, the rest moves."""
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    state = save_start(tmp_path / "start.npz", backbone)
    model = build(other(backbone, "start.npz"), classes=("benign", "malignant"), seed=1, images=drawn(2))
    loaded = {f"features.{k.split('.', 1)[1]}": v for k, v in model.trunk.state_dict().items()}
    assert all(torch.equal(loaded[k], v) for k, v in state.items())

    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = load_config(ROOT / "training" / "configs" / "compare.toml").optimisation
    optimizer = torch.optim.AdamW(parameter_groups(model, spec))
    set_trainable(model, Phase(epochs=1, size=96, frozen=["conv1", "layer1"]), batch_norm="frozen")
    nn.functional.cross_entropy(model(drawn(4)).logits, torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    free = {name for name in parameters if not name.startswith(("trunk.conv1.", "trunk.layer1."))}
    assert len(free) < len(parameters)
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == free
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= free
    assert {".".join(name.split(".")[:2]) for name in moved} >= {"trunk.layer2", "trunk.layer3", "trunk.layer4"}


def test_learning_rates_fall_with_the_stages_of_another_backbone() -> None:
    spec = load_config(ROOT / "training" / "configs" / "compare.toml").optimisation
    model = network(other("mobilenet_v2"), classes=2)
    rates = {id(p): group["lr"] for group in parameter_groups(model, spec) for p in group["params"]}
    for depth, stage in enumerate(["layer4", "layer3", "layer2", "layer1", "conv1"]):
        (rate,) = {rates[id(p)] for p in model.trunk.get_submodule(stage).parameters()}
        assert rate == pytest.approx(spec.trunk_lr * spec.layer_decay**depth)
    assert {rates[id(p)] for p in model.head.parameters()} == {spec.head_lr}


def test_a_start_of_another_backbone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    save_start(tmp_path / "start.npz", "mobilenet_v2")
    with pytest.raises(ValueError, match="does not fit the backbone"):
        build(other("densenet169", "start.npz"), classes=("benign", "malignant"), seed=1, images=drawn(2))


def test_only_resnet_has_a_gate() -> None:
    with pytest.raises(ValueError, match="alexnet takes none"):
        Model(backbone="alexnet", start="random", stride_variant="v1", gate="branch_softmax")


def test_a_run_gives_its_averaged_weights_back_as_they_are_stored(tmp_path: Path) -> None:
    fields = load_config(ROOT / "training" / "configs" / "smoke.toml").model_dump()
    config = Config.model_validate(fields | {"model": other("squeezenet1_1").model_dump()})
    model = build(config.model, classes=("benign", "malignant"), seed=1, images=drawn(2))
    ema = AveragedModel(build(config.model, classes=("benign", "malignant"), seed=2, images=drawn(2)))
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / CHECKPOINT, config, model, ema, optimizer, [], Fingerprints("a", "b"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found, averaged = from_run(tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert found == config
    assert not averaged.training
    stored = {k: v.half().float() if v.ndim > 1 else v for k, v in ema.module.state_dict().items()}
    assert averaged.state_dict().keys() == stored.keys()
    assert all(torch.equal(v, stored[k]) for k, v in averaged.state_dict().items())
    assert not torch.equal(logits(averaged, drawn(2)), logits(model, drawn(2)))
    with pytest.raises(ValueError, match="train first"):
        from_run(tmp_path / "absent")


@needs_real_data
@pytest.mark.parametrize("backbone", ["densenet169", "mobilenet_v2"])
def test_the_imagenet_weights_of_another_backbone_fit_its_batch_norm(backbone: str) -> None:
    """Inputs of each batch norm on photographs lie where its statistics say; with eps 1e-3, Keras's default, the
    median ratio of variances is 4 to 6, and raw pixels are off by orders of magnitude."""
    start = str(SHARED_DATA.absolute().parent / "pretrained" / f"{backbone}_imagenet.npz")
    model = build(other(backbone, start), classes=("benign", "malignant"), seed=1, images=drawn(2))
    files = [f for kind in ("benign", "malignant") for f in sorted((TRAINING / kind).iterdir())[::200][:4]]
    photographs = torch.stack([torch.from_numpy(decode(file.read_bytes()).pixels) for file in files])
    shifts, ratios = [], []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3))
        shifts.append(float(((mean - layer.running_mean) / (layer.running_var + layer.eps).sqrt()).abs().median()))
        ratios.append(float((var / (layer.running_var + layer.eps)).log().abs().median().exp()))

    for layer in norms(model):
        layer.register_forward_pre_hook(record)
    logits(model, photographs)
    assert len(shifts) == len(norms(model))
    assert max(shifts) < 1
    assert np.median(ratios) < 3
