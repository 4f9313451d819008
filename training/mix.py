"""Mix a fine-tuned run with the version it started from (WiSE-FT, arXiv 2109.01903), as a run of its own.

python -m training.mix --run runs/clinics-fold0 --shares 0 0.25 0.5 0.75 1     # what each share scores
python -m training.mix --run runs/clinics-fold0 --shares 0.5 --out runs/mixed  # write that one
python -m training.mix --run runs/clinics-fold0 --with runs/home-fold0 --shares 0.5 --out runs/mixed

Or with another run that came from the same start and held out the same images (model soups, arXiv 2203.05482).
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
    """`share` of the other weights and the rest of the run's, float32.

    Raises:
        ValueError: they are not of one architecture.
    """
    if {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in run.weights.items()}:
        raise ValueError("the two are not of one architecture: nothing lies between them")
    return {
        name: torch.from_numpy(share * start[name].astype(np.float32) + (1 - share) * own.astype(np.float32))
        for name, own in run.weights.items()
    }


def other_run(run: Run, path: Path) -> Run:
    """A finished run to mix with.

    Raises:
        ValueError: it is missing or unfinished, or may have been trained on what the run has held out.
    """
    other = read_finished(path)
    ours, theirs = run.config.data, other.config.data
    if theirs.extra not in (None, ours.extra):
        raise ValueError(f"{path} was trained with {theirs.extra}, of which the run knows nothing")
    same = run.fingerprints == other.fingerprints if theirs.extra else run.fingerprints.root == other.fingerprints.root
    if not same or (ours.classes, ours.held_out_fold) != (theirs.classes, theirs.held_out_fold):
        raise ValueError(f"{path} may have been trained on what the run holds out: their images, folds or seeds differ")
    return other


def write_mixed(run: Run, start: Weights, share: float, out: Path, *, mixed_with: str | None = None) -> None:
    """A finished run in folder `out` with the mixed weights and the same history; its config names what was mixed."""
    fields = run.config.model_dump()
    model_fields = fields["model"] | {"start_share": share, "mixed_with": mixed_with}
    config = Config.model_validate(fields | {"model": model_fields})
    model = network(config.model, classes=len(config.data.classes))
    model.load_state_dict(model.state_dict() | mixed(run, start, share))
    out.mkdir(parents=True, exist_ok=True)
    nothing = torch.optim.AdamW(model.parameters())
    save_checkpoint(out / CHECKPOINT, config, model, AveragedModel(model), nothing, run.history, run.fingerprints)
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
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--with", type=Path, dest="other", help="mix with this finished run instead of the start")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="of the start or the other run, 0..1")
    parser.add_argument("--out", type=Path, help="write the mixture of the one share into this folder")
    options = parser.parse_args(arguments)
    try:
        run = read_finished(options.run)
        if not options.other and not run.config.model.start.startswith(VERSION):
            raise ValueError(f"{options.run} did not start from a published version")
        if not all(0 <= share <= 1 for share in options.shares) or (options.out and len(options.shares) != 1):
            raise ValueError("--shares are from 0 to 1, and --out takes exactly one")
        other = other_run(run, options.other) if options.other else None
        start = other.weights if other else start_weights(run.config.model.start)
        if options.out:
            partner = other.config.run_name if other else None
            write_mixed(run, start, options.shares[0], options.out, mixed_with=partner)
            print(f"done: {options.out}. Publish with: python -m training.export --run {options.out}")
        else:
            scores(options.run, run, start, options.shares)
    except (ValueError, StoreError) as error:
        sys.exit(f"training.mix: {error}")


if __name__ == "__main__":
    main()
