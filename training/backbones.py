"""Build the network of a run and give it its start."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from app.model.architecture import LesionNet, PooledHead, load_backbone
from training.checkpoint import read_run
from training.config import Config, Model, data_dir
from training.start import VERSION, load_start

# The last child of torchvision's `features` in each of the five stages: they end where the resolution halves, or,
# where a backbone reaches its last resolution early, share its layers out
LAST_OF_STAGE = {
    "densenet169": ("pool0", "transition1", "transition2", "transition3", "relu5"),
    "mobilenet_v2": ("1", "3", "6", "13", "18"),
    "alexnet": ("2", "5", "7", "9", "12"),
    "squeezenet1_1": ("2", "4", "7", "10", "12"),
}
CHANNELS = {"densenet169": 1664, "mobilenet_v2": 1280, "alexnet": 256, "squeezenet1_1": 512}  # of the last map


class Stages(nn.Module):
    """The convolutions of another backbone under the stage names of `Trunk`, which it stands in for.

    The children of torchvision's `features` keep their names below those of the stages: `layer2.denseblock2…`.
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        features = get_model(backbone, weights=None).features
        if backbone == "densenet169":
            features.add_module("relu5", nn.ReLU(inplace=True))  # torchvision has it in `forward`
        children = iter(features.named_children())
        for stage, last in zip(("conv1", "layer1", "layer2", "layer3", "layer4"), LAST_OF_STAGE[backbone], strict=True):
            members = nn.Sequential()
            for name, child in children:
                members.add_module(name, child)
                if name == last:
                    break
            self.add_module(stage, members)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and backbone == "densenet169":
                module.eps = 1.001e-5  # Keras's, which the weights were trained with
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                # No batch norm follows: keep the variance from layer to layer (arXiv 1502.01852)
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float[B,3,H,W] -> the maps of the last two stages."""
        before, last = images, images
        for stage in self.children():
            before, last = last, stage(last)
        return before, last


def network(spec: Model, *, classes: int) -> LesionNet:
    """The network that a run names, its weights drawn from torch's generator.

    Backbones other than ResNet-50 get its head, so AlexNet's own large linear layers are not there.
    """
    model = LesionNet(
        gate=None if spec.gate == "none" else spec.gate, stride_variant=spec.stride_variant, classes=classes
    )
    if spec.backbone != "resnet50":
        model.trunk = Stages(spec.backbone)  # type: ignore[assignment]  # two maps are all that is asked of a trunk
        model.head = PooledHead(CHANNELS[spec.backbone], classes=classes)
    return model


def from_run(run_dir: Path) -> tuple[Config, LesionNet]:
    """The config of a run and its EMA weights, rounded as they are stored, as a float32 network in eval mode.

    Raises:
        ValueError: there is no checkpoint.
    """
    run = read_run(run_dir)
    with torch.random.fork_rng(devices=[]):
        model = network(run.config.model, classes=len(run.config.data.classes))
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in run.weights.items()}
    model.load_state_dict(model.state_dict() | state)
    return run.config, model.eval()


def build(spec: Model, *, classes: Sequence[str], seed: int, images: Tensor) -> LesionNet:
    """The network of a run with its start loaded; new layers are drawn from `seed`.

    Args:
        images: uint8[N,3,224,224] training images, for the statistics of a folded batch norm.

    Raises:
        ValueError: the start does not exist or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(spec, classes=len(classes))
    if spec.start == "random":
        measure_batch_norm(model, images)
        return model
    if spec.start.startswith(VERSION):
        load_start(model, spec.start, classes=classes)
        return model
    state = _read_start(spec.start)
    if spec.backbone != "resnet50":
        load_features(model, state)
        return model
    load_backbone(model, state)
    if "bn1.running_mean" not in state:
        restore_batch_norm(model, images)
    return model


def load_features(model: LesionNet, state: Mapping[str, Tensor]) -> None:
    """Load ImageNet weights under torchvision's names, `features.*`, into the trunk of another backbone.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    stage_of = {name: stage for stage, members in model.trunk.named_children() for name, _ in members.named_children()}
    expected = {k: v for k, v in model.trunk.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {}
    for key, value in state.items():
        name = key.removeprefix("features.")
        found[f"{stage_of.get(name.split('.')[0], key)}.{name}"] = value
    wrong = sorted(set(found) ^ set(expected)) or [k for k, v in expected.items() if found[k].shape != v.shape]
    if wrong:
        raise ValueError(f"the start does not fit the backbone: {len(wrong)} tensors, first {wrong[0]}")
    model.trunk.load_state_dict(found, strict=False)


def _read_start(start: str) -> dict[str, Tensor]:
    if start == "torchvision":
        from torchvision.models import ResNet50_Weights

        return dict(ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True))
    path = data_dir() / start
    if not path.is_file():
        raise ValueError(f"no start weights at {path}: set DERMLENS_DATA_DIR or model.start (see docs/training.md)")
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name].astype(np.float32)) for name in archive.files}


@torch.no_grad()
def measure_batch_norm(model: LesionNet, images: Tensor, *, batch_size: int = 32) -> None:
    """Set the running statistics of a random start from `images`, so that batch norm normalises from step one."""
    layers = [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # a plain average over the batches
    model.train()
    for batch in images.split(batch_size):
        model(batch)
    for layer in layers:
        layer.momentum = 0.1


@torch.no_grad()
def restore_batch_norm(model: LesionNet, images: Tensor, *, batch_size: int = 32) -> None:
    """Give a folded batch norm statistics to train with, without changing the function (../shared/DATA.md).

    For the input mean μ and variance σ² of each layer, measured in one pass over `images` uint8[N,3,H,W]:
    running_mean = μ, running_var = σ², weight = sqrt(σ² + eps), bias = folded bias + μ.
    """
    model.eval()
    layers = [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    sums = {layer: torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in layers}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1).double()
        sums[layer] += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])  # type: ignore[index]

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    for batch in images.split(batch_size):
        model.trunk((batch.float() - model.mean) / model.std)
    for hook in hooks:
        hook.remove()
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        layer.running_mean = mean.float()
        layer.running_var = (squares / count - mean.square()).clamp(min=0).float()
        layer.weight.copy_((layer.running_var + layer.eps).sqrt())
        layer.bias.add_(mean)
