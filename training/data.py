"""Images of a folder per class, decoded once as serving decodes them, and folds grouped by near-duplicate."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from tqdm import tqdm

from app.model.frame import lit_part
from app.model.preprocess import FORMATS, ImageError, decode
from training.checkpoint import Fingerprints
from training.config import Data, data_dir
from training.drawn import draw_dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
DUPLICATE_CORRELATION = 0.97  # ../shared/DATA.md: frames of one lesion lie above this
THUMBNAIL = 32  # pixels


@dataclass(frozen=True)
class Dataset:
    """All images of a run in memory (150 kB each)."""

    images: Tensor  # uint8[N,3,224,224]
    labels: Tensor  # int64[N]
    names: list[str]  # path below the root
    folds: NDArray[np.int64]  # [N], 0..folds−1; near-duplicates share one
    extra: NDArray[np.bool_]  # [N], whether from `data.extra`
    fingerprint: str  # SHA-256 over names, contents and folds
    root_fingerprint: str  # the same of the images of `data.root` alone

    @property
    def fingerprints(self) -> Fingerprints:
        return Fingerprints(self.fingerprint, self.root_fingerprint)

    def split(self, held_out_fold: int) -> "Split":
        """Indices of the training images and of the held-out fold; fold −1 holds nothing out."""
        held_out = self.folds == held_out_fold
        return Split(
            training=np.flatnonzero(~held_out),
            held_out=np.flatnonzero(held_out & ~self.extra),
            held_out_extra=np.flatnonzero(held_out & self.extra),
        )


@dataclass(frozen=True)
class Split:
    """Indices into a `Dataset`."""

    training: NDArray[np.int64]  # of both folders
    held_out: NDArray[np.int64]  # of `data.root`
    held_out_extra: NDArray[np.int64]  # of `data.extra`


def load_dataset(spec: Data, *, seed: int, progress: bool = True) -> Dataset:
    """Decode every image and assign folds; the same folder and seed always give the same folds.

    Raises:
        ValueError: a folder is missing or empty, or an image does not decode; the message names it.
    """
    files = [("root", *file) for file in _files(spec.root, spec.classes)]
    if spec.extra:
        files += [("extra", *file) for file in _files(spec.extra, spec.classes)]
    for folder in spec.without:
        files += [("without", *file) for file in _seen(folder)]
    names, whole, lit, digests = [], [], [], []
    for source, name, _, content in tqdm(files, desc="decode", unit="img", disable=None if progress else True):
        data = content.read_bytes() if isinstance(content, Path) else content
        try:
            pixels = decode(data).pixels
            whole.append(torch.from_numpy(pixels))
            lit.append(torch.from_numpy(decode(data, crop_frame=True).pixels) if lit_part(pixels) else whole[-1])
        except ImageError as error:
            raise ValueError(f"{name}: {error}") from None
        names.append(f"{spec.extra}/{name}" if source == "extra" else name)
        digests.append(hashlib.sha256(data).hexdigest())
    labels = np.array([label for _, _, label, _ in files])
    source = np.array([f[0] for f in files])
    kept = source != "without"
    if spec.extra or spec.without:
        groups = near_duplicates(torch.stack(lit))
        kept &= ~np.isin(groups, groups[source == "without"])
        kept &= (source == "root") | ~np.isin(groups, groups[source == "root"])
    if not kept[source == "root"].any():
        raise ValueError(
            f"every image of {spec.root} has a twin in {', '.join(spec.without)}: give images that are new"
        )
    folds = np.full(len(files), -1)
    # Each folder has folds of its own, so that those of `root` are the same with and without extra
    for part in ("root", "extra"):
        members = np.flatnonzero(kept & (source == part))
        if len(members):
            compared = lit if part in spec.lit_folds else whole
            own = near_duplicates(torch.stack([compared[i] for i in members]))
            folds[members] = assign_folds(own, labels[members], folds=spec.folds, seed=seed)
    lines = [f"{names[i]} {digests[i]} {folds[i]}" for i in np.flatnonzero(kept)]
    root_lines = [line for line, part in zip(lines, source[kept], strict=True) if part == "root"]
    return Dataset(
        images=torch.stack(lit if spec.crop_frame else whole)[kept],
        labels=torch.from_numpy(labels[kept]),
        names=[names[i] for i in np.flatnonzero(kept)],
        folds=folds[kept],
        extra=source[kept] == "extra",
        fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        root_fingerprint=hashlib.sha256("\n".join(root_lines).encode()).hexdigest(),
    )


def _files(folder: str, classes: list[str]) -> Iterator[tuple[str, int, Path | bytes]]:
    if folder == "drawn":
        yield from draw_dataset(classes)
        return
    root = data_dir() / folder
    for label, kind in enumerate(classes):
        if not (root / kind).is_dir():
            raise ValueError(f"no folder {root / kind}: set DERMLENS_DATA_DIR or data.root (see docs/training.md)")
        files = sorted(p for p in (root / kind).iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{root / kind} holds no {', '.join(FORMATS)} images")
        for path in files:
            yield f"{kind}/{path.name}", label, path


def _seen(folder: str) -> Iterator[tuple[str, int, Path]]:
    """Every image below a folder, whatever its class."""
    root = data_dir() / folder
    if not root.is_dir():
        raise ValueError(f"no folder {root}: without it the twins of what the start has seen cannot be left out")
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        yield str(path.relative_to(root)), -1, path


def near_duplicates(images: Tensor) -> NDArray[np.int64]:
    """Group number of each uint8[N,3,H,W] image; members of a group are linked by a thumbnail correlation above
    0.97 in any of the eight flips and quarter turns."""
    thumbs = np.stack([_thumbnail(image) for image in images])
    flat = _unit(thumbs)
    linked = np.zeros((len(images), len(images)), dtype=bool)
    for mirrored in (thumbs, thumbs[:, :, ::-1]):
        for turns in range(4):
            linked |= flat @ _unit(np.rot90(mirrored, turns, axes=(1, 2))).T > DUPLICATE_CORRELATION
    _, groups = connected_components(coo_matrix(linked), directed=False)
    return np.asarray(groups, dtype=np.int64)


def _thumbnail(image: Tensor) -> NDArray[np.float32]:
    grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR), dtype=np.float32)


def _unit(thumbs: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = thumbs.reshape(len(thumbs), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6))


def assign_folds(groups: NDArray[np.int64], labels: NDArray[np.int64], *, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each image [N]: stratified by class, members of a group together."""
    result = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(labels, labels, groups=groups)):
        result[members] = fold
    return result
