"""Train ASFF ResNet-50 or its baseline; run the same command again to resume.

python -m training.train --config training/configs/full.toml
torchrun --nproc-per-node=2 -m training.train --config training/configs/full.toml    # several nodes: docs/training.md
python -m training.train --config training/configs/transfer.toml --data FOLDER --init model_store/asff-resnet50/7
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from app.model.architecture import LesionNet
from app.model.store import StoreError
from training.augment import UNIFORMS, augment, mixup
from training.backbones import build
from training.calibrate import check_calibration
from training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint, write_history
from training.config import Config, Optimisation, Phase, load_config
from training.data import Dataset, load_dataset
from training.distributed import World, same_everywhere, world
from training.evaluate import predict_logits
from training.start import refuse_seen, with_version

Tensors = tuple[Tensor, ...] | list[Tensor]
STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")
RESTORE_IMAGES = 256  # training images that give a folded batch norm its statistics


def train(config: Config, run_dir: Path, world: World, *, until_epoch: int | None = None) -> None:
    """Train to the end of the schedule, to an early stop, or to `until_epoch`, and leave a checkpoint in `run_dir`.

    Raises:
        ValueError: the data, the start or an existing checkpoint does not fit the config.
    """
    dataset = load_dataset(config.data, seed=config.seed, progress=world.main)
    refuse_seen(config, dataset)
    split = dataset.split(config.data.held_out_fold)
    training = split.training
    if len(training) < config.optimisation.batch_size:
        raise ValueError(f"{len(training)} training images are fewer than one batch: lower optimisation.batch_size")
    if len(split.held_out):  # before the hours, and not after them
        check_calibration(dataset.labels[split.held_out].numpy(), classes=len(config.data.classes))
    statistics = dataset.images[training[:: max(1, len(training) // RESTORE_IMAGES)]]
    model = build(config.model, classes=config.data.classes, seed=config.seed, images=statistics)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=moving_average(config.optimisation.ema_decay))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimisation))
    run_dir.mkdir(parents=True, exist_ok=True)
    history = load_checkpoint(run_dir / CHECKPOINT, config, model, ema, optimizer, dataset.fingerprints)
    if not same_everywhere([len(history), int(dataset.fingerprint[:15], 16)], world):
        raise ValueError("the processes see different images or checkpoints: share DERMLENS_DATA_DIR and --run-dir")
    if world.main:
        state = f"resumes after epoch {len(history)}" if history else "starts"
        apart = f"{len(split.held_out)} held-out images, {len(split.held_out_extra)} more of data.extra"
        print(f"{config.name}: {state}; {len(training)} training and {apart}, on {world.device}")

    for epoch in range(len(history), min(config.epochs, until_epoch or config.epochs)):
        if stopped_early(history, config.optimisation.patience):
            break
        started = time.perf_counter()
        phase, epoch_in_phase = config.phase_of(epoch)
        loss = train_epoch(config, epoch, dataset, training, model=model, ema=ema, optimizer=optimizer, world=world)
        row = {"epoch": epoch + 1, "size": phase.size, "train_loss": loss}
        measured = phase.evaluate == "every" or epoch_in_phase + 1 == phase.epochs
        for name, members in (("held_out", split.held_out), ("held_out_extra", split.held_out_extra)):
            if len(members) and measured:
                with autocast(config.optimisation.precision, world.device):
                    logits = predict_logits(ema.module, dataset.images[members], size=phase.size, device=world.device)
                row |= held_out_row(name, dataset.labels[members], logits)
        history.append(row | {"seconds": time.perf_counter() - started})
        if world.main:
            save_checkpoint(run_dir / CHECKPOINT, config, model, ema, optimizer, history, dataset.fingerprints)
            write_history(run_dir, history)
            print("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()), flush=True)
    if world.main:
        print(
            f"done: {len(history)} of {config.epochs} epochs. Publish with: python -m training.export --run {run_dir}"
        )


def train_epoch(
    config: Config,
    epoch: int,
    dataset: Dataset,
    training: NDArray[np.int64],
    *,
    model: LesionNet,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> float:
    """One pass over the training images, each once; returns the mean loss of this process."""
    phase, epoch_in_phase = config.phase_of(epoch)
    set_trainable(model, phase, batch_norm=config.optimisation.batch_norm)
    parallel: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    batch_size = config.optimisation.batch_size
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    shares = (config.data.root_share, config.data.extra_share)
    order = epoch_order(dataset, training, shares, generator)
    steps = math.ceil(len(order) / batch_size)
    uniforms = torch.rand(len(order), UNIFORMS, generator=generator)
    loss_sum, seen = 0.0, 0
    bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{config.epochs}", disable=None if world.main else True)
    for step in bar:
        batch = range(step * batch_size, min((step + 1) * batch_size, len(order)))
        # Each process has to take part in each step: one without a share of a short last batch counts nothing
        mine, counts = (batch[world.rank :: world.size], 1) if world.rank < len(batch) else (batch[:1], 0)
        images = augment(dataset.images[order[mine]], uniforms[mine], size=phase.size, strength=config.augmentation)
        targets = F.one_hot(dataset.labels[order[mine]], len(config.data.classes)).float()
        if config.augmentation.mixup:
            images, targets = mixup(images, targets, alpha=config.augmentation.mixup, generator=generator)
        images = images.to(world.device, memory_format=torch.channels_last)
        rate = schedule(
            (epoch * steps + step) / (config.epochs * steps),
            step_in_phase=epoch_in_phase * steps + step,
            warmup_steps=min(config.optimisation.warmup_steps, phase.epochs * steps // 4),
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        with autocast(config.optimisation.precision, world.device):
            logits = parallel(images).logits
        loss = F.cross_entropy(
            logits.float(),
            targets.to(world.device),
            label_smoothing=config.optimisation.label_smoothing,
            reduction="sum",
        )
        # DDP averages over processes: this scale makes the gradient that of the global batch, however it is split, and
        # gives an image of a short last batch the weight of any other
        (loss * counts * world.size / batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        loss_sum, seen = loss_sum + counts * loss.item(), seen + counts * len(logits)
        bar.set_postfix(loss=f"{loss.item() / len(logits):.3f}")
    return loss_sum / max(1, seen)


def epoch_order(
    dataset: Dataset, training: NDArray[np.int64], shares: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """The images of an epoch: the shares of `data.root` and of `data.extra`, each image once, well mixed."""
    order = torch.from_numpy(training)[torch.randperm(len(training), generator=generator)]
    if shares == (1, 1):
        return order
    extra = torch.from_numpy(dataset.extra)[order]
    drawn = torch.zeros(len(order), dtype=torch.bool)
    for share, folder in zip(shares, (~extra, extra), strict=True):
        drawn |= folder & (folder.cumsum(0) <= round(share * int(folder.sum())))
    # In the order until here a share that is small comes before most of the other folder
    order = order[drawn]
    return order[torch.randperm(len(order), generator=generator)]


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average that remembers a tenth of its steps until `decay` remembers less.

    With `decay` from the first step on, a run of a hundred steps would be published as an average of its beginning.
    """

    def update(averaged: Tensors, current: Tensors, steps: Tensor | int) -> None:
        warm = (1 + int(steps)) / (10 + int(steps))
        get_ema_multi_avg_fn(min(decay, warm))(averaged, current, steps)

    return update


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic of a forward pass; weights and optimiser state stay in float32."""
    # A CPU without these instructions emulates bfloat16 convolutions, slower than float32; with them they took
    # 36 ms an image against 76 (160 pixels, two cores)
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    enabled = precision == "bfloat16" or (precision == "auto" and fast)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def schedule(progress: float, *, step_in_phase: int, warmup_steps: int) -> float:
    """Factor on every learning rate: one cosine over the run (`progress` 0..1), a linear warm-up at each phase."""
    return 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, (step_in_phase + 1) / (warmup_steps + 1))


def parameter_groups(model: LesionNet, spec: Optimisation) -> list[dict[str, Any]]:
    """Layer-wise learning rates; no weight decay on biases and batch norm."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        stage = name.removeprefix("trunk.").split(".")[0].replace("bn1", "conv1")
        depth = len(STAGES) - 1 - STAGES.index(stage) if stage in STAGES else None
        rate = spec.head_lr if depth is None else spec.trunk_lr * spec.layer_decay**depth
        groups.setdefault((rate, spec.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def set_trainable(model: LesionNet, phase: Phase, *, batch_norm: str) -> None:
    """Freeze the stages of a phase, and batch norm's running statistics where the config says so."""
    model.train(batch_norm == "train")
    for name, module in model.trunk.named_children():
        stage = name.replace("bn1", "conv1")
        module.requires_grad_(stage not in phase.frozen)
        if stage in phase.frozen:
            module.eval()


def held_out_row(name: str, labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Held-out log-loss and accuracy, and with two classes the ROC-AUC."""
    row = {
        f"{name}_log_loss": F.cross_entropy(logits, labels).item(),
        f"{name}_accuracy": float((logits.argmax(1) == labels).float().mean()),
    }
    if logits.shape[1] == 2:
        row[f"{name}_roc_auc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    return row


def stopped_early(history: list[dict[str, float]], patience: int) -> bool:
    """Whether the held-out log-loss has not improved for `patience` epochs; never where nothing is held out."""
    losses = [row["held_out_log_loss"] for row in history if "held_out_log_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see training/configs/")
    parser.add_argument("--run-dir", type=Path, help="checkpoint and metrics go here (default runs/<name>)")
    parser.add_argument("--data", type=Path, help="train on this folder instead, one sub-folder a class, 2 to 100")
    parser.add_argument("--init", type=Path, help="start from a published version, e.g. model_store/asff-resnet50/1")
    parser.add_argument("--fold", type=int, help="hold out this fold instead of the config's; -1 holds nothing out")
    parser.add_argument("--until-epoch", type=int, help="stop after this epoch; the same command goes on later")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        if options.data:
            config = config.with_data(options.data)
        if options.init:
            config = with_version(config, options.init)
        if options.fold is not None:
            config = config.with_fold(options.fold)
        with world() as processes:
            run_dir = options.run_dir or Path("runs") / config.run_name
            train(config, run_dir, processes, until_epoch=options.until_epoch)
    except (ValueError, StoreError) as error:
        sys.exit(f"training.train: {error}")


if __name__ == "__main__":
    main()
