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

from app.model.preprocess import FORMATS, ImageError, decode
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
    fingerprint: str  # SHA-256 over names, contents and folds

    def split(self, held_out_fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the training images and of the held-out fold."""
        held_out = self.folds == held_out_fold
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def load_dataset(spec: Data, *, seed: int, progress: bool = True) -> Dataset:
    """Decode every image and assign folds; the same folder and seed always give the same folds.

    Raises:
        ValueError: a folder is missing or empty, or an image does not decode; the message names it.
    """
    names, labels, decoded, digests = [], [], [], []
    for name, label, content in tqdm(list(_files(spec)), desc="decode", unit="img", disable=None if progress else True):
        data = content.read_bytes() if isinstance(content, Path) else content
        try:
            decoded.append(torch.from_numpy(decode(data).pixels))
        except ImageError as error:
            raise ValueError(f"{name}: {error}") from None
        names.append(name)
        labels.append(label)
        digests.append(hashlib.sha256(data).hexdigest())
    images = torch.stack(decoded)
    folds = assign_folds(images, np.array(labels), folds=spec.folds, seed=seed)
    lines = "\n".join(f"{n} {d} {f}" for n, d, f in zip(names, digests, folds, strict=True))
    fingerprint = hashlib.sha256(lines.encode()).hexdigest()
    return Dataset(images, torch.tensor(labels), names, folds, fingerprint)


def _files(spec: Data) -> Iterator[tuple[str, int, Path | bytes]]:
    if spec.root == "drawn":
        yield from draw_dataset(spec.classes)
        return
    root = data_dir() / spec.root
    for label, kind in enumerate(spec.classes):
        if not (root / kind).is_dir():
            raise ValueError(f"no folder {root / kind}: set DERMLENS_DATA_DIR or data.root (see docs/training.md)")
        files = sorted(p for p in (root / kind).iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{root / kind} holds no {', '.join(FORMATS)} images")
        for path in files:
            yield f"{kind}/{path.name}", label, path


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


def assign_folds(images: Tensor, labels: NDArray[np.int64], *, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each image: stratified by class, near-duplicates together."""
    result = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(labels, labels, groups=near_duplicates(images))):
        result[members] = fold
    return result
