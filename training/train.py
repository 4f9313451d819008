"""Train ASFF ResNet-50 or its baseline; run the same command again to resume.

python -m training.train --config training/configs/full.toml
torchrun --nproc-per-node=2 -m training.train --config training/configs/full.toml
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from app.model.architecture import LesionNet
from training.augment import UNIFORMS, augment
from training.backbones import build
from training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint, write_history
from training.config import Config, Optimisation, Phase, load_config
from training.data import Dataset, load_dataset
from training.distributed import World, world
from training.evaluate import predict_logits

STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")
RESTORE_IMAGES = 256  # training images that give a folded batch norm its statistics


def train(config: Config, run_dir: Path, world: World, *, until_epoch: int | None = None) -> None:
    """Train to the end of the schedule, to an early stop, or to `until_epoch`, and leave a checkpoint in `run_dir`.

    Raises:
        ValueError: the data, the start or an existing checkpoint does not fit the config.
    """
    dataset = load_dataset(config.data, seed=config.seed, progress=world.main)
    training, held_out = dataset.split(config.data.held_out_fold)
    if len(training) < config.optimisation.batch_size:
        raise ValueError(f"{len(training)} training images are fewer than one batch: lower optimisation.batch_size")
    statistics = dataset.images[training[: RESTORE_IMAGES * 8 : 8]]
    model = build(config.model, classes=len(config.data.classes), seed=config.seed, images=statistics)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optimisation.ema_decay))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimisation))
    run_dir.mkdir(parents=True, exist_ok=True)
    history = load_checkpoint(run_dir / CHECKPOINT, config, model, ema, optimizer)
    if world.main:
        state = f"resumes after epoch {len(history)}" if history else "starts"
        print(f"{config.name}: {state}; {len(training)} training and {len(held_out)} held-out images on {world.device}")

    for epoch in range(len(history), min(config.epochs, until_epoch or config.epochs)):
        if stopped_early(history, config.optimisation.patience):
            break
        started = time.perf_counter()
        phase, _ = config.phase_of(epoch)
        loss = train_epoch(config, epoch, dataset, training, model=model, ema=ema, optimizer=optimizer, world=world)
        logits = predict_logits(ema.module, dataset.images[held_out], size=phase.size, device=world.device)
        row = {"epoch": epoch + 1, "size": phase.size, "train_loss": loss}
        row |= held_out_row(dataset.labels[held_out], logits)
        history.append(row | {"seconds": time.perf_counter() - started})
        if world.main:
            save_checkpoint(run_dir / CHECKPOINT, config, model, ema, optimizer, history)
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
    training: np.ndarray[Any, np.dtype[np.int64]],
    *,
    model: LesionNet,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> float:
    """One pass over the training images; returns the mean loss of this process."""
    phase, epoch_in_phase = config.phase_of(epoch)
    set_trainable(model, phase, batch_norm=config.optimisation.batch_norm)
    parallel: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    batch_size = config.optimisation.batch_size
    steps = len(training) // batch_size
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.from_numpy(training)[torch.randperm(len(training), generator=generator)]
    uniforms = torch.rand(len(training), UNIFORMS, generator=generator)
    losses = []
    bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{config.epochs}", disable=None if world.main else True)
    for step in bar:
        mine = slice(step * batch_size + world.rank, (step + 1) * batch_size, world.size)
        images = augment(dataset.images[order[mine]], uniforms[mine], size=phase.size, strength=config.augmentation).to(
            world.device, memory_format=torch.channels_last
        )
        rate = schedule(
            (epoch * steps + step) / (config.epochs * steps),
            step_in_phase=epoch_in_phase * steps + step,
            warmup_steps=config.optimisation.warmup_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=world.device.type == "cuda"):
            logits = parallel(images).logits
        loss = F.cross_entropy(
            logits.float(),
            dataset.labels[order[mine]].to(world.device),
            label_smoothing=config.optimisation.label_smoothing,
            reduction="sum",
        )
        # DDP averages over processes: this scale makes the gradient that of the global batch, however it is split
        (loss * world.size / batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        losses.append(loss.item() / len(logits))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return float(np.mean(losses))


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
    for stage in STAGES:
        names = ("conv1", "bn1") if stage == "conv1" else (stage,)
        for module in (getattr(model.trunk, name) for name in names):
            module.requires_grad_(stage not in phase.frozen)
            if stage in phase.frozen:
                module.eval()


def held_out_row(labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Held-out log-loss and accuracy, and with two classes the ROC-AUC."""
    row = {
        "held_out_log_loss": F.cross_entropy(logits, labels).item(),
        "held_out_accuracy": float((logits.argmax(1) == labels).float().mean()),
    }
    if logits.shape[1] == 2:
        row["held_out_roc_auc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    return row


def stopped_early(history: list[dict[str, float]], patience: int) -> bool:
    """Whether the held-out log-loss has not improved for `patience` epochs."""
    losses = [row["held_out_log_loss"] for row in history]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see training/configs/")
    parser.add_argument("--run-dir", type=Path, help="checkpoint and metrics go here (default runs/<name>)")
    parser.add_argument("--until-epoch", type=int, help="stop after this epoch; the same command goes on later")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        with world() as processes:
            run_dir = options.run_dir or Path("runs") / config.name
            train(config, run_dir, processes, until_epoch=options.until_epoch)
    except ValueError as error:
        sys.exit(f"training.train: {error}")


if __name__ == "__main__":
    main()
