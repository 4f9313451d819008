"""Train and compare networks on one recipe, fold and budget; run the same command again to resume.

python -m training.compare --config training/configs/compare.toml --only asff-branch resnet50
python -m training.compare --config training/configs/compare.toml --table-only
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn

from app.model.architecture import AdaptiveFusion, LesionNet
from app.model.manifest import Metric
from training.backbones import from_run, network
from training.calibrate import cross_fitted
from training.config import Config, load_config
from training.data import load_dataset
from training.distributed import World, world
from training.evaluate import Floats, Labels, all_metrics, predict_logits, with_intervals
from training.statistics import DeLong, McNemar, delong, mcnemar
from training.train import train

# What differs from the config's model section
NETWORKS: dict[str, dict[str, str]] = {
    "asff-branch": {"gate": "branch_softmax"},
    "asff-channel": {"gate": "channel_softmax"},
    "resnet50": {"gate": "none"},
    "densenet169": {
        "backbone": "densenet169",
        "gate": "none",
        "start": "../pretrained/densenet169_imagenet.npz",
    },
    "mobilenet_v2": {
        "backbone": "mobilenet_v2",
        "gate": "none",
        "start": "../pretrained/mobilenet_v2_imagenet.npz",
    },
    "alexnet": {"backbone": "alexnet", "gate": "none", "start": "random"},
    "squeezenet1_1": {"backbone": "squeezenet1_1", "gate": "none", "start": "random"},
}
ASFF = ("asff-branch", "asff-channel")
BASELINE = "resnet50"
METRICS = ("accuracy", "precision", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc")


@dataclass(frozen=True)
class Predictions:
    """A network's answers on the held-out fold, as stored in `<evidence>/comparison/<network>.csv`."""

    names: list[str]
    labels: Labels  # [N], 0 or 1
    logits: Floats  # [N], of class 1 less that of class 0
    probabilities: Floats  # [N], of class 1, calibrated on the other images of the fold
    positive: NDArray[np.bool_]  # [N], decisions at the balanced point, fitted on the other images too


def variant(config: Config, name: str) -> Config:
    """The run of one network of the table."""
    fields = config.model_dump()
    model = fields["model"] | NETWORKS[name]
    # A random start has nothing to preserve: frozen, its first stages would stay noise
    phases = [phase | {"frozen": []} if model["start"] == "random" else phase for phase in fields["phases"]]
    return Config.model_validate(fields | {"name": f"{config.name}-{name}", "model": model, "phases": phases})


def run(config: Config, name: str, *, runs: Path, folder: Path, world: World) -> None:
    """Train one network, or go on with it, and write its predictions and its gate's shares into `folder`.

    Raises:
        ValueError: as `train`, or nothing is held out, or there are other than two classes.
    """
    if config.data.held_out_fold < 0 or len(config.data.classes) != 2:
        raise ValueError("a comparison needs a held-out fold and two classes")
    own = variant(config, name)
    train(own, runs / own.name, world)
    if world.main:
        predict(runs / own.name, name, folder=folder, device=world.device)


def predict(run_dir: Path, name: str, *, folder: Path, device: torch.device) -> None:
    """Write what a run's EMA weights say of the held-out fold, in float32 and at the last phase's resolution."""
    config, model = from_run(run_dir)
    model = model.to(device).to(memory_format=torch.channels_last)
    dataset = load_dataset(config.data, seed=config.seed)
    held_out = dataset.split(config.data.held_out_fold).held_out
    images, size = dataset.images[held_out], config.phases[-1].size
    folder.mkdir(parents=True, exist_ok=True)
    if model.fusion is None:
        logits = predict_logits(model, images, size=size, device=device).numpy()
    else:
        logits, shares = predict_with_gate(model, images, fusion=model.fusion, size=size, device=device)
        write_rows(folder / f"{name}-gate.csv", gate_rows(name, shares))
    labels = dataset.labels[held_out].numpy()
    judged = cross_fitted(labels, logits)
    found = Predictions(
        names=[dataset.names[i] for i in held_out],
        labels=labels,
        logits=logits[:, 1] - logits[:, 0],
        probabilities=judged.probabilities[:, 1],
        positive=judged.decided == 1,
    )
    write_predictions(folder / f"{name}.csv", found)


def predict_with_gate(
    model: LesionNet, images: Tensor, *, fusion: AdaptiveFusion, size: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits float32[N,2] of uint8[N,3,H,W] images and `a` float32[N,C] of the model's gate, the share of conv4."""
    shares: list[Tensor] = []

    def record(_: nn.Module, maps: tuple[Tensor, Tensor]) -> None:
        conv4, conv5 = maps
        f2 = F.interpolate(fusion.project(conv5), size=conv4.shape[-2:], mode="bilinear", align_corners=False)
        shares.append(fusion.weights(conv4, f2).cpu())

    hook = fusion.register_forward_pre_hook(record)
    logits = predict_logits(model, images, size=size, device=device)
    hook.remove()
    return logits.numpy(), torch.cat(shares).numpy()


def gate_rows(name: str, shares: NDArray[np.float32]) -> list[dict[str, str | float]]:
    """The distribution of `a` float32[N,C] over images and channels: mean, spreads and 101 quantiles."""
    quantities: list[tuple[str, float | str, float]] = [
        ("mean", "", float(shares.mean())),
        # Near nought where the gate gives every image the same weights, so that it adapts to nothing
        ("sd_between_images", "", float(shares.std(axis=0).mean())),
        ("sd_between_channels", "", float(shares.mean(axis=0).std())),
    ]
    levels = np.linspace(0, 1, 101)
    quantiles = np.quantile(shares.astype(np.float64), levels)
    quantities += [("quantile", round(float(q), 2), float(a)) for q, a in zip(levels, quantiles, strict=True)]
    return [{"network": name, "quantity": kind, "at": at, "a": f"{a:.6g}"} for kind, at, a in quantities]


def write_predictions(path: Path, found: Predictions) -> None:
    columns = zip(found.names, found.labels, found.logits, found.probabilities, found.positive, strict=True)
    write_rows(
        path,
        [
            # Nine digits: rounding must not tie what the network told apart
            {"name": name, "label": y, "logit": f"{z:.9g}", "probability": f"{p:.9g}", "positive": int(yes)}
            for name, y, z, p, yes in columns
        ],
    )


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` wrote."""
    rows = read_rows(path)
    return Predictions(
        names=[row["name"] for row in rows],
        labels=np.array([int(row["label"]) for row in rows]),
        logits=np.array([float(row["logit"]) for row in rows]),
        probabilities=np.array([float(row["probability"]) for row in rows]),
        positive=np.array([row["positive"] == "1" for row in rows]),
    )


def write_tables(config: Config, folder: Path) -> None:
    """Write table.csv, paired.csv and gates.csv from the predictions in `folder`, and print the first two.

    Raises:
        ValueError: there are no predictions, or they are of different images.
    """
    found = {name: read_predictions(folder / f"{name}.csv") for name in NETWORKS if (folder / f"{name}.csv").is_file()}
    if not found:
        raise ValueError(f"no predictions in {folder}: run without --table-only first")
    first = next(iter(found.values()))
    for name, one in found.items():
        if one.names != first.names or (one.labels != first.labels).any():
            raise ValueError(f"{folder / name}.csv is of other images than the rest: predict it again")
    table = []
    for name, one in found.items():
        parameters = sum(p.numel() for p in network(variant(config, name).model, classes=2).parameters())
        # Not the probabilities: their five temperatures reorder images of different pieces of the fold
        measured = with_intervals(all_metrics, one.labels, expit(one.logits), one.positive)
        table.append(table_row(name, parameters, measured))
        print(f"{name:14}{parameters / 1e6:6.1f} M  " + "  ".join(f"{k} {text(measured[k])}" for k in METRICS))
    write_rows(folder / "table.csv", table)
    if BASELINE in found:
        pairs = [paired_row(name, *compare(found[name], found[BASELINE])) for name in ASFF if name in found]
        write_rows(folder / "paired.csv", pairs)
        for pair in pairs:
            print(
                f"{pair['network']} against {BASELINE}: McNemar p {pair['mcnemar_p']} "
                f"({pair['only_network_right']} to {pair['only_baseline_right']}), ROC-AUC {pair['auc_difference']} "
                f"({pair['auc_low']} to {pair['auc_high']}), DeLong p {pair['delong_p']}"
            )
    gates = [folder / f"{name}-gate.csv" for name in ASFF if (folder / f"{name}-gate.csv").is_file()]
    write_rows(folder / "gates.csv", [row for path in gates for row in read_rows(path)])
    missing = [name for name in NETWORKS if name not in found]
    print(f"done: {folder / 'table.csv'}" + (f", still without {', '.join(missing)}" if missing else ""))


def compare(one: Predictions, baseline: Predictions) -> tuple[McNemar, DeLong]:
    """Both paired tests of a network against another on the same images."""
    right = one.positive == (one.labels == 1)
    baseline_right = baseline.positive == (baseline.labels == 1)
    return mcnemar(right, baseline_right), delong(one.labels, one.logits, baseline.logits)


def table_row(name: str, parameters: int, measured: Mapping[str, Metric]) -> dict[str, str | int]:
    row: dict[str, str | int] = {"network": name, "parameters": parameters}
    for key in METRICS:
        metric = measured[key]
        row |= {key: f"{metric.value:.6f}", f"{key}_low": f"{metric.low:.6f}", f"{key}_high": f"{metric.high:.6f}"}
    return row


def paired_row(name: str, decisions: McNemar, ranking: DeLong) -> dict[str, str | int]:
    return {
        "network": name,
        "baseline": BASELINE,
        "only_network_right": decisions.only_first,
        "only_baseline_right": decisions.only_second,
        "mcnemar_p": f"{decisions.p:.4g}",
        "auc_network": f"{ranking.first:.6f}",
        "auc_baseline": f"{ranking.second:.6f}",
        "auc_difference": f"{ranking.difference:.6f}",
        "auc_low": f"{ranking.low:.6f}",
        "auc_high": f"{ranking.high:.6f}",
        "delong_p": f"{ranking.p:.4g}",
    }


def text(metric: Metric) -> str:
    return f"{metric.value:.3f} ({metric.low:.3f}–{metric.high:.3f})"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="TOML file, training/configs/compare.toml")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks (default all)")
    parser.add_argument("--evidence", type=Path, default=Path("runs/evidence"), help="CSV files go to its comparison/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="a folder a network with its checkpoint")
    parser.add_argument("--table-only", action="store_true", help="train nothing, build the tables from the CSV files")
    options = parser.parse_args(arguments)
    folder = options.evidence / "comparison"
    try:
        config = load_config(options.config)
        if options.table_only:
            write_tables(config, folder)
            return
        with world() as processes:
            for name in options.only:
                run(config, name, runs=options.runs, folder=folder, world=processes)
    except ValueError as error:
        sys.exit(f"training.compare: {error}")
    print(f"done: {', '.join(options.only)} in {folder}. Tables: the same command with --table-only")


if __name__ == "__main__":
    main()
