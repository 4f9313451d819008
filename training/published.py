"""A published version with the images that it was trained on."""

from pathlib import Path
from typing import NamedTuple

from app.model import store
from app.model.store import LoadedVersion
from training.config import Config
from training.data import Dataset, load_dataset


class Trained(NamedTuple):
    version: LoadedVersion
    config: Config
    dataset: Dataset


def load_trained(folder: Path) -> Trained:
    """The version in `folder`, and its data.

    Raises:
        StoreError: the version is damaged. ValueError: its data are not here, or are other data.
    """
    version = load_version(folder)
    config = Config.model_validate(version.manifest.training_config)
    dataset = load_dataset(config.data, seed=config.seed)
    if version.manifest.split.fingerprint not in (dataset.fingerprint, dataset.root_fingerprint):
        raise ValueError(f"{folder} was trained on other images than {config.data.root} holds here")
    return Trained(version, config, dataset)


def load_version(folder: Path) -> LoadedVersion:
    """The verified version in `<store>/<name>/<version>`; raises StoreError."""
    return store.load(folder.parent.parent, folder.parent.name, folder.name)
