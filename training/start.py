"""A published version as the start of a run, and what it has seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app.model import store
from app.model.architecture import LesionNet
from app.model.manifest import Manifest
from training.config import Config, Data
from training.data import Dataset
from training.published import load_version

VERSION = "version:"  # `model.start = "version:model_store/asff-resnet50/1"`


def start_weights(start: str) -> dict[str, NDArray[np.generic]]:
    """The verified arrays of the version behind `model.start`.

    Raises:
        StoreError: the version is missing or damaged.
    """
    return load_version(_folder(start)).weights


def load_start(model: LesionNet, start: str, *, classes: Sequence[str]) -> None:
    """Give `model` the weights of a version; the last layer stays as drawn where that has other classes.

    Raises:
        StoreError: the version is missing or damaged.
        ValueError: its architecture is another one.
    """
    version = load_version(_folder(start))
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in version.weights.items()}
    own = model.state_dict()
    if version.manifest.classes != tuple(classes):
        state = {k: v for k, v in state.items() if not k.startswith("head.fc2.")}
    fitting = {k for k, v in state.items() if k in own and own[k].shape == v.shape}
    needed = {k for k in own if not k.startswith("head.fc2.") and not k.endswith("num_batches_tracked")}
    if fitting != set(state) or needed - fitting:
        raise ValueError(f"{start} is of another architecture: model.gate or model.stride_variant differs")
    model.load_state_dict(state, strict=False)


def with_version(config: Config, folder: Path) -> Config:
    """The run with a published version as its start, and without the twins of what that version was trained on.

    Raises:
        StoreError: there is no such version.
    """
    manifest = _manifest(f"{VERSION}{folder}")
    model = {
        "start": f"{VERSION}{folder}",
        "stride_variant": manifest.architecture.stride_variant,
        "gate": manifest.architecture.gate or "none",
    }
    lineage = _lineage(manifest)
    seen = {name for past in lineage for name in _folders(_data(past))} | _forgotten(lineage)
    data = {
        "without": sorted(seen - _folders(config.data) - {"drawn"}),
        "crop_frame": config.data.crop_frame or manifest.preprocessing.crop_frame,
    }
    fields = config.model_dump()
    return Config.model_validate(fields | {"model": fields["model"] | model, "data": fields["data"] | data})


def refuse_seen(config: Config, dataset: Dataset) -> None:
    """Refuse a start that was trained on images of the held-out fold.

    A version that held out the same fold of the same images is no such start, with or without `data.extra` beside.

    Raises:
        ValueError: the start, or what it was itself started from, has seen the held-out fold.
    """
    start, fold = config.model.start, config.data.held_out_fold
    if fold < 0 or not start.startswith(VERSION):
        return
    lineage = _lineage(_manifest(start))
    if shared := _forgotten(lineage) & _folders(config.data):
        raise ValueError(
            f"{start} goes back to a version that is no longer here and was trained on {', '.join(sorted(shared))}: "
            "bring that version back, or hold nothing out (--fold -1)"
        )
    for manifest in lineage:
        past = _data(manifest)
        shared = _folders(past) & _folders(config.data)
        same = manifest.split.fingerprint in (dataset.fingerprint, dataset.root_fingerprint)
        if shared and not (same and past.held_out_fold == fold):
            raise ValueError(
                f"{start} was trained on {', '.join(sorted(shared))} and may have seen the held-out fold: "
                f"use its own data section and fold ({past.held_out_fold}), or hold nothing out (--fold -1)"
            )


def _lineage(manifest: Manifest) -> list[Manifest]:
    """A version and those it was started from, up to one that is no longer in the store."""
    found = [manifest]
    while (start := Config.model_validate(found[-1].training_config).model.start).startswith(VERSION):
        try:
            earlier = _manifest(start)
        except store.VersionMissing:
            break
        if earlier.created > found[-1].created:  # another one, in the place of what it was started from
            break
        found.append(earlier)
    return found


def _forgotten(lineage: list[Manifest]) -> set[str]:
    """Folders that versions before the lineage have seen; the last one, if it had others, left their twins out."""
    last = Config.model_validate(lineage[-1].training_config)
    return set(last.data.without) if last.model.start.startswith(VERSION) else set()


def _data(manifest: Manifest) -> Data:
    return Config.model_validate(manifest.training_config).data


def _manifest(start: str) -> Manifest:
    folder = _folder(start)
    return store.read_manifest(folder.parent.parent, folder.parent.name, folder.name)


def _folder(start: str) -> Path:
    return Path(start.removeprefix(VERSION))


def _folders(data: Data) -> set[str]:
    return {folder for folder in (data.root, data.extra) if folder}
