"""Do the maps explain the network? Accepted checks of explanations on held-out images, networks side by side.

python -m training.explain_eval --run asff=runs/asff-fold0 --run resnet50=runs/resnet50-fold0

Every map is the class-activation map of the class that the network predicts: what `/explain` shows unless asked
otherwise. Where a check asks what made the network find something, it judges the images that are not called by the
first class alone: benign is the absence of findings, it has no place, and painting over a lesion only helps it.
Finished checks are kept in `<evidence>/explanations.csv`; the same command goes on where it stopped.
"""

import argparse
import csv
import hashlib
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from app.model.labels import calibrate
from app.model.overlay import render
from training.backbones import from_run
from training.config import Config
from training.data import Dataset, load_dataset
from training.explain_checks import (
    CHECKS,
    KEPT_IN_PLACE,
    Network,
    Sample,
    Values,
    look,
    resized,
)
from training.lesion_mask import lesion_mask
from training.statistics import RESAMPLES

SHEET_IMAGES = 24
TILE = 150  # pixels


@dataclass(frozen=True)
class Row:
    """A mean over images with its 95% bootstrap interval."""

    network: str
    check: str
    condition: str
    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Criterion:
    """What a map must show to pass, settled before any network was measured."""

    check: str
    condition: str
    claim: str
    rule: Literal["low >", "high <", "value >="]
    limit: float

    def holds(self, row: Row) -> bool:
        """NaN, for want of images, holds nothing."""
        match self.rule:
            case "low >":
                return row.low > self.limit
            case "high <":
                return row.high < self.limit
            case _:
                return row.value >= self.limit


CRITERIA = (
    # A map that outlives the weights describes the picture; 60 images can tell 0.1 from nothing
    Criterion("randomisation", "end − floor, absolute", "random weights leave nothing of the map", "high <", 0.1),
    # A map no better than noise explains nothing
    Criterion("deletion-insertion", "deletion, map − random", "deletion beats random maps", "high <", 0.0),
    Criterion("deletion-insertion", "insertion, map − random", "insertion beats random maps", "low >", 0.0),
    # Lesions are photographed in the middle: a blob there is the map to beat
    Criterion("deletion-insertion", "deletion, map − centre", "deletion beats a central blob", "high <", 0.0),
    Criterion("deletion-insertion", "insertion, map − centre", "insertion beats a central blob", "low >", 0.0),
    # Evidence spread evenly has the lesion's share of the picture inside it
    Criterion("lesion-share", "map − area", "evidence gathers in the lesion", "low >", 0.0),
    # A blob hits a centred lesion without looking at it
    Criterion("lesion-share", "map − centre", "evidence gathers there more than a central blob", "low >", 0.0),
    # The eye sees the same picture: half of the variance of ranks, 0.7², must stay
    *(Criterion("stability", f"{kind} 1", f"weak {kind} moves little", "value >=", 0.7) for kind in KEPT_IN_PLACE),
    # Two methods agree on an image more than on other images, whose lesions are in the middle too
    *(
        Criterion("second-opinions", f"{name}, own − other", f"{name} agrees", "low >", 0.0)
        for name in ("integrated-gradients", "occlusion")
    ),
)


def judge(rows: Sequence[Row]) -> list[tuple[Criterion, Row, bool]]:
    """The criteria of the checks that one network's rows hold, with the row judged and whether it passes."""
    found = {(row.check, row.condition): row for row in rows}
    judged = [(c, found[c.check, c.condition]) for c in CRITERIA if (c.check, c.condition) in found]
    return [(criterion, row, criterion.holds(row)) for criterion, row in judged]


def summarise(network: str, check: str, found: Mapping[str, Values]) -> list[Row]:
    """A row a condition: mean over its images and 95% percentile interval over bootstrap resamples of them; NaN where
    there are none."""
    rows = []
    for condition, values in found.items():
        if not len(values):
            rows.append(Row(network, check, condition, math.nan, math.nan, math.nan, 0))  # meets no criterion
            continue
        pick = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(values[pick].mean(axis=1), [2.5, 97.5])
        rows.append(Row(network, check, condition, float(values.mean()), float(low), float(high), len(values)))
    return rows


def evaluate(networks: Sequence[Network], sample: Sample, path: Path) -> list[Row]:
    """Every check of every network, each kept in the CSV file `path` as it ends and not done again."""
    rows = read_rows(path)
    keys = {network.name: fingerprint(network, sample) for network in networks}
    for name, key in keys.items():
        if not any(r.network == name and r.condition == key for r in rows):
            rows = [r for r in rows if r.network != name]  # of other weights, images or numbers of them
            rows.append(Row(name, "fingerprint", key, 1.0, 1.0, 1.0, len(sample.labels)))
    done = {(r.network, r.check) for r in rows}
    todo = [(n, check) for n in networks for check in CHECKS if (n.name, check) not in done]
    bar = tqdm(todo, desc="explain_eval", unit="check", disable=None)
    for network, check in bar:
        bar.set_postfix_str(f"{network.name} {check}")
        rows += summarise(network.name, check, CHECKS[check](network, sample))
        write_rows(path, rows)
    return [r for r in rows if r.network in keys]


def fingerprint(network: Network, sample: Sample) -> str:
    """SHA-256 over weights, images and resolution."""
    digest = hashlib.sha256(f"{network.size} {network.precision}".encode())
    for tensor in (sample.images, *network.model.state_dict().values()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                network=r["network"],
                check=r["check"],
                condition=r["condition"],
                value=float(r["value"]),
                low=float(r["low"]),
                high=float(r["high"]),
                images=int(r["images"]),
            )
            for r in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([f"{v:.6f}" if isinstance(v, float) else v for v in astuple(row)] for row in rows)
    os.replace(partial, path)


def verdict_text(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Every criterion, and beside it whether each network passes and its figure with interval."""
    answers = [judge([row for row in rows if row.network == name]) for name in names]
    lines = ["".join(f"{name:>32}" for name in names)]
    for same in zip(*answers, strict=True):
        cells = [f"{'pass' if ok else 'FAIL'} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for _, r, ok in same]
        criterion = same[0][0]
        lines.append("".join(f"{cell:>32}" for cell in cells) + f"  {criterion.check}: {criterion.claim}")
    passed = [sum(ok for _, _, ok in judged) for judged in answers]
    lines.append("".join(f"{f'{p} of {len(j)} pass':>32}" for p, j in zip(passed, answers, strict=True)))
    return "\n".join(lines)


def contact_sheet(networks: Sequence[Network], sample: Sample, *, photographs: bool) -> bytes:
    """PNG of up to 24 images: the lesion's outline, then the map of each network's prediction with the outline.

    Right and wrong answers of the first network, of each class, are as equal in number as they can be.

    Args:
        photographs: without them the maps lie on black, and no pixel of a patient's image is in the picture.
    """
    seen = [look(network, resized(sample.images, network.size)) for network in networks]
    chosen = _mixed(sample.labels.numpy(), seen[0].predicted)
    columns = 3
    width, height = TILE * (1 + len(networks)) + 8, TILE + 16
    sheet = Image.new("RGB", (width * columns, height * -(-len(chosen) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        left, top = place % columns * width, place // columns * height
        pixels = sample.images[index].permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((TILE, TILE)) if photographs else Image.new("RGB", (TILE, TILE))
        outline = _outline(sample.masks[index])
        label = int(sample.labels[index])
        sheet.paste(_drawn(picture, outline), (left, top))
        pen.text((left + 2, top + TILE + 2), f"class {label}", fill="black")
        for column, (network, answer) in enumerate(zip(networks, seen, strict=True), start=1):
            predicted = int(answer.predicted[index])
            probability = calibrate(answer.logits[index : index + 1], 1.0)[0, predicted]
            overlay = render(
                answer.cams[index, predicted],
                picture,
                style="overlay" if photographs else "heatmap",
                alpha=0.7,
                description=network.name,
            )
            tile = Image.open(io.BytesIO(overlay.png)).convert("RGB")
            sheet.paste(_drawn(tile, outline), (left + column * TILE, top))
            text = f"{network.name[:14]}: {predicted} {probability:.2f}"
            pen.text((left + column * TILE + 2, top + TILE + 2), text, fill="black" if predicted == label else "red")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _mixed(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> list[int]:
    """Up to 24 indices, the groups (class, right or wrong) taking turns."""
    groups = [
        list(np.flatnonzero((labels == label) & ((predicted == label) == right)))
        for label in np.unique(labels)
        for right in (True, False)
    ]
    turns = [int(group[turn]) for turn in range(len(labels)) for group in groups if turn < len(group)]
    return sorted(turns[:SHEET_IMAGES], key=lambda i: (labels[i], predicted[i]))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool[TILE,TILE], the ring just outside the mask."""
    small = np.asarray(Image.fromarray(mask).resize((TILE, TILE)), dtype=bool)
    return np.asarray(ndimage.binary_dilation(small, iterations=1) & ~small)


def _drawn(picture: Image.Image, outline: NDArray[np.bool_]) -> Image.Image:
    pixels = np.array(picture)
    pixels[outline] = (0, 255, 0)
    return Image.fromarray(pixels)


def held_out_sample(dataset: Dataset, fold: int, *, images: int, seed: int) -> Sample:
    """A seeded draw of `images` held-out images, classes taking turns as long as they last.

    Raises:
        ValueError: nothing is held out, or fewer than two images are asked for.
    """
    if images < 2:
        raise ValueError("maps are compared with those of other images: ask for at least 2 --images")
    held_out = dataset.split(fold).held_out
    if not len(held_out):
        raise ValueError(f"fold {fold} holds no image out: explanations are judged on images that no network has seen")
    labels = dataset.labels[held_out].numpy()
    order = np.random.default_rng(seed).permutation(len(held_out))
    turn = np.empty(len(held_out), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    chosen = held_out[np.lexsort((labels, turn))[:images]]
    pixels = dataset.images[chosen]
    masks = [lesion_mask(image.numpy()) for image in tqdm(pixels, desc="lesion masks", leave=False, disable=None)]
    return Sample(pixels, dataset.labels[chosen], np.stack(masks))


def load_runs(runs: Sequence[str]) -> tuple[Config, list[Network]]:
    """`NAME=runs/dir` each -> the networks at the resolution of their last phase, and the config they share images by.

    Raises:
        ValueError: a run has no checkpoint, or the runs hold different images out.
    """
    configs, networks = [], []
    for run in runs:
        name, given, folder = run.partition("=")
        if not given:
            raise ValueError(f"--run {run}: write NAME=FOLDER")
        config, model = from_run(Path(folder))
        configs.append(config)
        channels_last = model.to(memory_format=torch.channels_last)
        networks.append(Network(name, channels_last, config.phases[-1].size, config.optimisation.precision))
    if len({network.name for network in networks}) < len(networks):
        raise ValueError("two runs have one name: give each its own, --run NAME=FOLDER")
    if any((c.data, c.seed) != (configs[0].data, configs[0].seed) for c in configs):
        raise ValueError("the runs differ in [data] or seed: their held-out images are not the same")
    return configs[0], networks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.explain_eval", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", required=True, help="NAME=FOLDER of a run; give several to compare")
    parser.add_argument("--images", type=int, default=60, help="held-out images")
    parser.add_argument("--evidence", type=Path, default=Path("runs/evidence"), help="folder of the results")
    options = parser.parse_args(arguments)
    try:
        config, networks = load_runs(options.run)
        dataset = load_dataset(config.data, seed=config.seed)
        sample = held_out_sample(dataset, config.data.held_out_fold, images=options.images, seed=config.seed)
    except ValueError as error:
        sys.exit(f"training.explain_eval: {error}")
    rows = evaluate(networks, sample, options.evidence / "explanations.csv")
    for photographs, name in ((True, "contact_sheet_photographs.png"), (False, "contact_sheet.png")):
        (options.evidence / name).write_bytes(contact_sheet(networks, sample, photographs=photographs))
    print(verdict_text([network.name for network in networks], rows))
    print(f"{len(sample.labels)} images, {options.evidence}/: explanations.csv, contact_sheet.png (no photographs), …")


if __name__ == "__main__":
    main()
