"""Build the network of a run and give it its start."""

import numpy as np
import torch
from torch import Tensor, nn

from app.model.architecture import LesionNet, load_backbone
from training.config import Model, data_dir


def build(spec: Model, *, classes: int, seed: int, images: Tensor) -> LesionNet:
    """The network of a run with its start loaded; new layers are drawn from `seed`.

    Args:
        images: uint8[N,3,224,224] training images, for the statistics of a folded batch norm.

    Raises:
        ValueError: the start does not exist or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = None if spec.gate == "none" else spec.gate
        model = LesionNet(gate=gate, stride_variant=spec.stride_variant, classes=classes)
    if spec.start == "random":
        measure_batch_norm(model, images)
        return model
    state = _read_start(spec.start)
    load_backbone(model, state)
    if "bn1.running_mean" not in state:
        restore_batch_norm(model, images)
    return model


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
