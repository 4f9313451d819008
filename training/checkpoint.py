"""What a run leaves after every epoch: one safetensors file to resume from, metrics.csv and TensorBoard."""

import csv
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from app.model.architecture import LesionNet
from training.config import Config

CHECKPOINT = "checkpoint.safetensors"


class Fingerprints(NamedTuple):
    """Which images, in which folds, a run has seen: as in `Dataset`."""

    every: str
    root: str


class Run(NamedTuple):
    config: Config
    history: list[dict[str, float]]
    weights: dict[str, NDArray[np.generic]]  # EMA, as they will be stored
    fingerprints: Fingerprints


def save_checkpoint(
    path: Path,
    config: Config,
    model: LesionNet,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    fingerprints: Fingerprints,
) -> None:
    """One safetensors file, replaced atomically: weights, EMA and optimiser state, the rest in its header."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    header = {
        "config": config.model_dump_json(),
        "history": json.dumps(history),
        "fingerprints": json.dumps(fingerprints),
    }
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=header)
    os.replace(partial, path)


def load_checkpoint(
    path: Path,
    config: Config,
    model: LesionNet,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    fingerprints: Fingerprints,
) -> list[dict[str, float]]:
    """Restore everything that `save_checkpoint` wrote; an absent file is an empty history.

    Raises:
        ValueError: the checkpoint belongs to another config, or to other images.
    """
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        if Config.model_validate_json(header["config"]) != config:
            raise ValueError(f"{path} was made with another config: give another --run-dir, or delete it")
        if _fingerprints(header) != fingerprints:  # one image more or less, and all folds are others
            raise ValueError(f"{path} has seen other images than are here now: give another --run-dir, or delete it")
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


def read_run(run_dir: Path) -> Run:
    """The last epoch's EMA weights of a run, matrices rounded to float16, vectors in float32.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = run_dir / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"no {path}: train first, python -m training.train --config training/configs/full.toml")
    prefix = "ema.module."
    weights: dict[str, NDArray[np.generic]] = {}
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not name.endswith("num_batches_tracked"):
                array = file.get_tensor(key)
                weights[name] = array.astype(np.float16) if array.ndim > 1 else array
    config = Config.model_validate_json(header["config"])
    return Run(config, json.loads(header["history"]), weights, _fingerprints(header))


def _fingerprints(header: dict[str, str]) -> Fingerprints:
    return Fingerprints(*json.loads(header["fingerprints"]))


def write_history(run_dir: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv, whole, and the last epoch to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with (run_dir / "metrics.csv").open("w", newline="") as file:
        columns = dict.fromkeys(key for row in history for key in row)  # not every epoch measures the held-out fold
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(history)
    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=int(history[-1]["epoch"])) as board:
        for name, value in history[-1].items():
            board.add_scalar(name, value, int(history[-1]["epoch"]))
