"""Mix a fine-tuned run with the version it started from (WiSE-FT, arXiv 2109.01903), as a run of its own.

python -m training.mix --run runs/clinics-fold0 --shares 0 0.25 0.5 0.75 1     # what each share scores
python -m training.mix --run runs/clinics-fold0 --shares 0.5 --out runs/mixed  # write that one
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from app.model.store import StoreError
from training.backbones import from_run, network
from training.checkpoint import CHECKPOINT, Run, save_checkpoint, write_history
from training.config import Config
from training.data import load_dataset
from training.evaluate import predict_logits
from training.held_out import SIZE, read_finished
from training.start import VERSION, start_weights
from training.train import autocast, held_out_row

Weights = Mapping[str, NDArray[np.generic]]


def mixed(run: Run, start: Weights, share: float) -> dict[str, Tensor]:
    """`share` of the start's weights and the rest of the run's, float32.

    Raises:
        ValueError: they are not of one architecture.
    """
    if {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in run.weights.items()}:
        raise ValueError("the run and its start are not of one architecture: nothing lies between them")
    return {
        name: torch.from_numpy(share * start[name].astype(np.float32) + (1 - share) * own.astype(np.float32))
        for name, own in run.weights.items()
    }


def write_mixed(run: Run, start: Weights, share: float, out: Path) -> None:
    """A finished run in folder `out` with the mixed weights and the same history; its config names the share."""
    fields = run.config.model_dump()
    config = Config.model_validate(fields | {"model": fields["model"] | {"start_share": share}})
    model = network(config.model, classes=len(config.data.classes))
    model.load_state_dict(model.state_dict() | mixed(run, start, share))
    out.mkdir(parents=True, exist_ok=True)
    nothing = torch.optim.AdamW(model.parameters())
    save_checkpoint(out / CHECKPOINT, config, model, AveragedModel(model), nothing, run.history)
    write_history(out, run.history)


def scores(run_dir: Path, run: Run, start: Weights, shares: Sequence[float]) -> list[dict[str, float]]:
    """Held-out accuracy and ROC-AUC of each share, at `data.root` and at `data.extra`."""
    dataset = load_dataset(run.config.data, seed=run.config.seed)
    split = dataset.split(run.config.data.held_out_fold)
    _, model = from_run(run_dir)
    model = model.to(memory_format=torch.channels_last)
    rows = []
    for share in shares:
        model.load_state_dict(model.state_dict() | mixed(run, start, share))
        row = {"share": share}
        for name, members in (("held_out", split.held_out), ("held_out_extra", split.held_out_extra)):
            if len(members):
                with autocast(run.config.optimisation.precision, torch.device("cpu")):
                    logits = predict_logits(model, dataset.images[members], size=SIZE, device=torch.device("cpu"))
                row |= held_out_row(name, dataset.labels[members], logits)
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.mix", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished run that started from a version (--init)")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="of the start, 0..1")
    parser.add_argument("--out", type=Path, help="write the mixture of the one share into this folder")
    options = parser.parse_args(arguments)
    try:
        run = read_finished(options.run)
        if not run.config.model.start.startswith(VERSION):
            raise ValueError(f"{options.run} did not start from a published version")
        if not all(0 <= share <= 1 for share in options.shares) or (options.out and len(options.shares) != 1):
            raise ValueError("--shares are from 0 to 1, and --out takes exactly one")
        start = start_weights(run.config.model.start)
        if options.out:
            write_mixed(run, start, options.shares[0], options.out)
            print(f"done: {options.out}. Publish with: python -m training.export --run {options.out}")
        else:
            scores(options.run, run, start, options.shares)
    except (ValueError, StoreError) as error:
        sys.exit(f"training.mix: {error}")


if __name__ == "__main__":
    main()
