"""The model store: publish, verify, load and promote versions. Nothing is unpickled, nothing half-written is seen.

model_store/<name>/current            the served version
model_store/<name>/<version>/         manifest.json weights.safetensors openvino/ MODEL_CARD.md report/
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError

from app.model.manifest import FileRecord, Manifest

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
INT8 = ("openvino/int8.xml", "openvino/int8.bin")  # graph and its weights, where the version carries them


class StoreError(Exception):
    """A version that cannot be used; the message says which and what to do."""


class VersionMissing(StoreError):
    """No such version, or no version is current."""


class VersionDamaged(StoreError):
    """A file is missing, unreadable, or not the one that was published."""


class VersionExists(StoreError):
    """Published versions never change."""


class Int8Graph(NamedTuple):
    """An OpenVINO model, see `training.quantize`."""

    xml: bytes
    weights: bytes


@dataclass(frozen=True)
class LoadedVersion:
    manifest: Manifest
    weights: dict[str, NDArray[np.generic]]  # as stored: float16 matrices, float32 vectors
    int8: Int8Graph | None = None


def versions(root: Path, name: str) -> list[str]:
    """Published versions of a model, oldest number first."""
    folders = (root / name).iterdir() if (root / name).is_dir() else ()
    found = [f.name for f in folders if (f / MANIFEST).is_file() and not f.name.startswith(".")]
    return sorted(found, key=lambda version: (len(version), version))


def current(root: Path, name: str) -> str:
    """The version that `current` names.

    Raises:
        VersionMissing: the store has no such file.
    """
    try:
        return (root / name / "current").read_text().strip()
    except OSError:
        raise VersionMissing(
            f"no version of {name} is current in {root.resolve()}: train and export one, or set DERMLENS_MODEL_STORE"
        ) from None


def read_manifest(root: Path, name: str, version: str) -> Manifest:
    """The checked manifest of a version; its files are not read.

    Raises:
        VersionMissing, VersionDamaged.
    """
    path = root / name / version / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError:
        known = ", ".join(versions(root, name)) or "none"
        raise VersionMissing(f"no version {version!r} of {name} in {root.resolve()}; there: {known}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise VersionDamaged(f"{path}: {where}: {first['msg']}") from None
    if (manifest.name, manifest.version) != (name, version):
        raise VersionDamaged(f"{path} describes {manifest.name} {manifest.version}: the folder was renamed or copied")
    return manifest


def verify(root: Path, name: str, version: str) -> Manifest:
    """Check size and SHA-256 of every file of a version.

    Raises:
        VersionMissing, VersionDamaged.
    """
    manifest = read_manifest(root, name, version)
    for file in manifest.files:
        _read_verified(root / name / version, file, manifest)
    return manifest


def load(root: Path, name: str, version: str) -> LoadedVersion:
    """Verify a version and read its weights from the very bytes that were verified.

    Raises:
        VersionMissing, VersionDamaged.
    """
    manifest = read_manifest(root, name, version)
    files = dict.fromkeys((WEIGHTS, *manifest.files))  # weights once, even where the manifest forgets them
    contents = {file: _read_verified(root / name / version, file, manifest) for file in files}
    int8 = Int8Graph(*(contents[file] for file in INT8)) if set(INT8) <= set(contents) else None
    try:
        return LoadedVersion(manifest, safetensors.numpy.load(contents[WEIGHTS]), int8)
    except SafetensorError as error:
        raise VersionDamaged(f"{WEIGHTS} of {name} {version} is not a safetensors file: {error}") from None


def _read_verified(folder: Path, file: str, manifest: Manifest) -> bytes:
    record = manifest.files.get(file)
    if record is None:
        raise VersionDamaged(f"{folder / MANIFEST} lists no {file}")
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        raise VersionDamaged(f"{folder / MANIFEST} names a file outside its folder: {file}")
    try:
        data = (folder / file).read_bytes()
    except OSError:
        raise VersionDamaged(f"{folder / file} is missing: restore it from where this version was published") from None
    if _record(data) != record:
        raise VersionDamaged(
            f"{folder / file} is not the published file (SHA-256 differs): restore it, do not serve it"
        )
    return data


def _record(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def publish(root: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a new version whole or not at all; the manifest's `files` is filled in here.

    Args:
        files: content under its path in the version's folder; `weights.safetensors` among them.

    Raises:
        VersionExists: the version is published already.
    """
    final = root / manifest.name / manifest.version
    if final.exists():
        raise VersionExists(f"{final} exists: published versions never change, publish the next number")
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    manifest = manifest.model_copy(update={"files": {path: _record(data) for path, data in files.items()}})
    for path, data in {**files, MANIFEST: manifest.model_dump_json(indent=2).encode()}.items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        _write_synced(partial / path, data)
    os.rename(partial, final)
    _sync_folder(final.parent)
    return final


def promote(root: Path, name: str, version: str) -> None:
    """Make a verified version the served one, atomically.

    Raises:
        VersionMissing, VersionDamaged: and `current` stays as it was.
    """
    load(root, name, version)
    partial = root / name / ".current.partial"
    _write_synced(partial, f"{version}\n".encode())
    os.replace(partial, root / name / "current")
    _sync_folder(root / name)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
