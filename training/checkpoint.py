"""What a run leaves after every epoch: one safetensors file to resume from, metrics.csv and TensorBoard."""

import csv
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from app.model.architecture import LesionNet
from training.config import Config

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(
    path: Path,
    config: Config,
    model: LesionNet,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> None:
    """One safetensors file, replaced atomically: weights, EMA and optimiser state, the rest in its header."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    header = {"config": config.model_dump_json(), "history": json.dumps(history)}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=header)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, config: Config, model: LesionNet, ema: AveragedModel, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """Restore everything that `save_checkpoint` wrote; an absent file is an empty history.

    Raises:
        ValueError: the checkpoint belongs to another config.
    """
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        if header["config"] != config.model_dump_json():
            raise ValueError(f"{path} was made with another config: give another --run-dir, or delete it")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    model.load_state_dict(parts["model"])
    ema.load_state_dict(parts["ema"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    history: list[dict[str, float]] = json.loads(header["history"])
    return history


def write_history(run_dir: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv, whole, and the last epoch to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with (run_dir / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=int(history[-1]["epoch"])) as board:
        for name, value in history[-1].items():
            board.add_scalar(name, value, int(history[-1]["epoch"]))
