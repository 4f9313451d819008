"""How networks hold up when photographs get worse: accuracy and ROC-AUC against each kind of corruption.

python -m training.robustness --run resnet50=runs/compare-resnet50-fold0 --run asff=runs/compare-asff-branch-fold0

The threshold is fitted on held-out images that are not measured, clean ones, as in use: nobody fits it to bad pictures.
Answers are kept in `<evidence>/robustness/` for each network and kind; the same command goes on where it stopped.
"""

import argparse
import csv
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from training.backbones import from_run
from training.calibrate import fit, judge
from training.config import Config
from training.corruptions import KINDS, LEVELS, STRENGTHS, corrupt
from training.data import load_dataset
from training.evaluate import Floats, Labels, predict_logits
from training.plots import new_figure, png
from training.statistics import auc_of_resamples, resamples
from training.train import autocast

CLEAN = "clean"
ALL = "all"  # every kind together, in the summary
METRICS = ("accuracy", "roc_auc")


@dataclass(frozen=True)
class Network:
    name: str
    model: nn.Module  # gives logits float[B,2]
    size: int  # pixels, that of its last phase
    precision: str  # as in `config.Optimisation`
    digest: str  # SHA-256 of its weights


@dataclass(frozen=True)
class Row:
    """A line of robustness.csv."""

    network: str  # or "B - A": how much B lies above A on the same images
    kind: str  # "clean" or a corruption
    strength: int  # 1..5; 0 where clean
    metric: str
    value: float
    low: float  # 95% bootstrap interval over the images
    high: float
    images: int


@dataclass(frozen=True)
class Summary:
    """A line of robustness_summary.csv: the mean over the five strengths."""

    network: str
    kind: str  # "clean", a corruption or "all"
    metric: str
    value: float
    low: float
    high: float
    images: int


def load_networks(runs: Sequence[str]) -> tuple[Config, list[Network]]:
    """The networks of NAME=FOLDER runs, and the config of the first for the images that all of them held out.

    Raises:
        ValueError: a run is missing, or the runs do not hold out the same images of two classes.
    """
    configs, networks = [], []
    for run in runs:
        name, _, folder = run.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not folder:
            raise ValueError(f"--run {run}: write NAME=FOLDER, the name of letters, digits and . + - _")
        config, model = from_run(Path(folder))
        if config.data.held_out_fold < 0 or len(config.data.classes) != 2:
            raise ValueError(f"{folder} holds no images of two classes out: take a run with a fold")
        weights = hashlib.sha256()
        for key, value in model.state_dict().items():
            weights.update(key.encode() + value.cpu().numpy().tobytes())
        configs.append(config)
        networks.append(
            Network(name, model, config.phases[-1].size, config.optimisation.precision, weights.hexdigest())
        )
    if len({network.name for network in networks}) < len(networks):
        raise ValueError("two runs have one name: give each its own, --run NAME=FOLDER")
    # `extra` joins the training images and changes nothing about the folds of `root`
    held_out = [(c.data.model_copy(update={"extra": None}), c.seed) for c in configs]
    for run, other in zip(runs, held_out, strict=True):
        if other != held_out[0]:
            raise ValueError(f"{runs[0]} and {run} differ in [data] or seed: their held-out images are not the same")
    return configs[0], networks


def spoilt(images: Tensor, kind: str, strength: int) -> Tensor:
    """uint8[N,3,H,W] -> the same corrupted, each image with its place as its seed."""
    return torch.stack(
        [torch.from_numpy(corrupt(x, kind, strength=strength, seed=i)) for i, x in enumerate(images.numpy())]
    )


def answer(
    networks: Sequence[Network], images: Tensor, measured: NDArray[np.int64], *, folder: Path, device: torch.device
) -> dict[tuple[str, str], Floats]:
    """Logit of class 1 less that of class 0 for each (network, kind): [1,N] of all clean images uint8[N,3,H,W],
    [5,M] of the measured ones corrupted. What `folder` holds of the same weights and images is read from there."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(images.numpy().tobytes() + measured.tobytes()).hexdigest()
    kinds = (CLEAN, *KINDS)
    paths = {
        (n.name, kind): folder / f"{n.name}-{kind}-{_key(n, kind, digest)}.csv" for n in networks for kind in kinds
    }
    missing = {kind: [n for n in networks if not paths[n.name, kind].is_file()] for kind in kinds}
    steps = sum(len(todo) * (1 if kind == CLEAN else len(STRENGTHS)) for kind, todo in missing.items())
    with tqdm(total=steps, desc="robustness", unit="set", disable=None) as bar:
        for kind, todo in missing.items():
            rows: dict[str, list[Floats]] = {n.name: [] for n in todo}
            for strength in STRENGTHS if todo and kind != CLEAN else (0,):
                pictures = images if kind == CLEAN or not todo else spoilt(images[measured], kind, strength)
                for network in todo:
                    bar.set_postfix_str(f"{network.name}, {kind} {strength}")
                    rows[network.name].append(_logits(network, pictures, device))
                    bar.update()
            for network in todo:
                _write_answers(paths[network.name, kind], np.stack(rows[network.name]))
    return {key: np.loadtxt(path, delimiter=",", ndmin=2) for key, path in paths.items()}


def _key(network: Network, kind: str, images_digest: str) -> str:
    """Of everything that an answer depends on, short enough for a file's name."""
    parts = (network.digest, network.size, network.precision, images_digest, LEVELS.get(kind))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _logits(network: Network, images: Tensor, device: torch.device) -> Floats:
    model = network.model.to(device).to(memory_format=torch.channels_last)
    with autocast(network.precision, device):
        logits = predict_logits(model, images, size=network.size, device=device).double().numpy()
    return np.asarray(logits[:, 1] - logits[:, 0])


def _write_answers(path: Path, logits: Floats) -> None:
    partial = path.with_suffix(".partial")
    np.savetxt(partial, logits, fmt="%.9g", delimiter=",")
    os.replace(partial, path)


Draws = dict[tuple[str, str, int], dict[str, Floats]]  # (network, kind, strength) -> metric -> [1+R], the value first


def measure(
    answers: Mapping[tuple[str, str], Floats], labels: Labels, measured: NDArray[np.int64]
) -> tuple[list[Row], list[Summary]]:
    """Metrics of the measured ones of the held-out images; the labels [N] are of all of these.

    All conditions share their resamples, so that the difference of two networks, the last from the first, is paired.
    """
    others = np.setdiff1d(np.arange(len(labels)), measured)
    own = labels[measured]
    counts = resamples(own)
    draws: Draws = {}
    names = list(dict.fromkeys(name for name, _ in answers))
    for name in names:
        clean = answers[name, CLEAN][0]
        calibration = fit(labels[others], _pair(clean[others]))
        for kind in (CLEAN, *KINDS):
            for index, logits in enumerate([clean[measured]] if kind == CLEAN else answers[name, kind]):
                right = judge(_pair(logits), calibration).decided == own
                auc = auc_of_resamples(counts, own, logits)
                auc[0] = roc_auc_score(own, logits)
                strength = 0 if kind == CLEAN else STRENGTHS[index]
                draws[name, kind, strength] = {"accuracy": counts @ right / len(own), "roc_auc": auc}
    if len(names) > 1:
        pair = f"{names[-1]} - {names[0]}"
        names.append(pair)
        for kind, strength in [key[1:] for key in draws if key[0] == names[0]]:
            first, last = draws[names[0], kind, strength], draws[names[-2], kind, strength]
            draws[pair, kind, strength] = {metric: last[metric] - first[metric] for metric in METRICS}
    rows = [
        Row(*key, metric, *_interval(drawn), images=len(own))
        for key, found in draws.items()
        for metric, drawn in found.items()
    ]
    return rows, [
        Summary(name, kind, metric, *_interval(np.mean(members, axis=0)), images=len(own))
        for name in names
        for kind in (CLEAN, *KINDS, ALL)
        for metric in METRICS
        if (members := [d[metric] for (n, k, _), d in draws.items() if n == name and _belongs(k, kind)])
    ]


def _belongs(kind: str, group: str) -> bool:
    return kind == group or (group == ALL and kind != CLEAN)


def _pair(logits: Floats) -> NDArray[np.float32]:
    """Logits [N,2] of that difference [N]."""
    return np.stack([np.zeros_like(logits), logits], axis=1).astype(np.float32)


def _interval(drawn: Floats) -> tuple[float, float, float]:
    low, high = np.percentile(drawn[1:], [2.5, 97.5])
    return float(drawn[0]), float(low), float(high)


def robustness_figure(rows: Sequence[Mapping[str, str]]) -> bytes:
    """PNG of the rows of robustness.csv: a column a kind, accuracy and ROC-AUC against strength, a line a network.

    Strength 0 is the clean image; bands are 95% intervals.
    """
    names = [name for name in dict.fromkeys(row["network"] for row in rows) if " - " not in name]
    figure = new_figure(2.1 * len(KINDS), 5.5, f"Robustness, {rows[0]['images']} held-out images, 95% intervals")
    panels = figure.subplots(len(METRICS), len(KINDS), sharex=True, sharey="row", squeeze=False)
    for line, (metric, label) in enumerate(zip(METRICS, ("accuracy", "ROC-AUC"), strict=True)):
        for axes, kind in zip(panels[line], KINDS, strict=True):
            for name in names:
                own = [r for r in rows if (r["network"], r["metric"]) == (name, metric) and r["kind"] in (CLEAN, kind)]
                own.sort(key=lambda row: int(row["strength"]))
                strengths = [int(row["strength"]) for row in own]
                value, low, high = ([float(row[key]) for row in own] for key in ("value", "low", "high"))
                axes.plot(strengths, value, "o-", markersize=3, label=name)
                axes.fill_between(strengths, low, high, alpha=0.15)
            axes.grid(alpha=0.3)
            if line == 0:
                axes.set_title(kind)
            else:
                axes.set(xlabel="strength", xticks=(0, *STRENGTHS))
        panels[line][0].set_ylabel(label)
    panels[0][0].legend()
    return png(figure)


def summary_table(summary: Sequence[Summary]) -> str:
    """Clean, mean over all kinds and strengths, and the kind that is worst on average, a line a network and metric."""
    lines = [f"{'network':24} {'metric':9} {'clean':>7}  {'all kinds (95% interval)':28} worst kind"]
    for name, metric in dict.fromkeys((s.network, s.metric) for s in summary):
        own = {s.kind: s for s in summary if (s.network, s.metric) == (name, metric)}
        worst = min((own[kind] for kind in KINDS), key=lambda s: s.value)
        mean = f"{own[ALL].value:.4f} ({own[ALL].low:.4f} to {own[ALL].high:.4f})"
        lines.append(f"{name:24} {metric:9} {own[CLEAN].value:7.4f}  {mean:28} {worst.kind} {worst.value:.4f}")
    return "\n".join(lines)


def robustness(runs: Sequence[str], *, images: int, evidence: Path) -> None:
    """Measure NAME=FOLDER runs on `images` held-out images; write robustness.csv and its summary, and print the latter.

    Raises:
        ValueError: as `load_networks`, or the held-out images do not suffice.
    """
    config, networks = load_networks(runs)
    dataset = load_dataset(config.data.model_copy(update={"extra": None}), seed=config.seed)
    held_out = dataset.split(config.data.held_out_fold).held_out
    labels = dataset.labels[held_out].numpy()
    others = len(held_out) - images
    if min(images, others) < 4:
        raise ValueError(f"--images {images} of {len(held_out)} held-out images: some must be left for the threshold")
    measured, _ = train_test_split(np.arange(len(held_out)), train_size=images, stratify=labels, random_state=0)
    measured.sort()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers = answer(networks, dataset.images[held_out], measured, folder=evidence / "robustness", device=device)
    rows, summary = measure(answers, labels, measured)
    _write_rows(evidence / "robustness.csv", rows)
    _write_rows(evidence / "robustness_summary.csv", summary)
    print(summary_table(summary))
    print(f"{images} held-out images, threshold fitted on the {others} others, clean: {evidence / 'robustness.csv'}")


def _write_rows(path: Path, rows: Sequence[Row | Summary]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.robustness", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", required=True, help="NAME=FOLDER of a run; the last less the first")
    parser.add_argument("--images", type=int, default=240, help="held-out images to measure on")
    parser.add_argument("--evidence", type=Path, default=Path("runs/evidence"), help="folder of the results")
    options = parser.parse_args(arguments)
    try:
        robustness(options.run, images=options.images, evidence=options.evidence)
    except ValueError as error:
        sys.exit(f"training.robustness: {error}")


if __name__ == "__main__":
    main()
