"""The model store: publish, adopt, verify, load, promote, roll back and prune versions. Nothing is unpickled.

model_store/<name>/current            the served version
model_store/<name>/previous           lines `VERSION REPLACED`: where `rollback` goes when VERSION is current
model_store/<name>/<version>/         manifest.json[.sha256] weights.safetensors openvino/ MODEL_CARD.md report/
model_store/<name>/.<name>.partial    half-written or half-deleted, so never read; `prune` removes what a kill left
model_store/<name>/.lock              held by the one process that changes this folder

The process may be killed or the power cut at any step: a name is given by rename, to what is whole and on disk.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from app.model import metadata
from app.model.manifest import FileRecord, Identifier, Manifest, NewerSchema
from app.model.out_of_distribution import FILE as FAMILIAR
from app.model.out_of_distribution import Familiar, from_arrays

MANIFEST = "manifest.json"
CHECKSUM = "manifest.json.sha256"
WEIGHTS = "weights.safetensors"
INT8 = ("openvino/int8.xml", "openvino/int8.bin")  # graph and its weights, where the version carries them
PAGES = ("*.md", "report/*.html", "report/*.png")  # rendered from the rest, so in no manifest (decision 004)
CURRENT, PREVIOUS = "current", "previous"  # files beside the versions, so no version has these names
IDENTIFIER = TypeAdapter(Identifier)
REPORT = "report"  # its pictures and pages are rendered after publishing, so no manifest lists them
REPORT_FILE = re.compile(r"[A-Za-z0-9_-]+\.(png|html)")


class StoreError(Exception):
    """A version that cannot be used; the message says which and what to do."""


class VersionMissing(StoreError):
    """No such version, or no version is current."""


class VersionDamaged(StoreError):
    """A file is missing, unreadable, or not the one that was published."""


class ReportMissing(StoreError):
    """The report of a version has no such picture or page."""


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
    familiar: Familiar | None = None  # what a score is computed from; None: the version flags nothing
    fusion: metadata.Fusion | None = None  # None: it answers from the image alone


@dataclass(frozen=True)
class Package:
    """A version that was published elsewhere, in the very bytes that were verified."""

    version: LoadedVersion
    files: dict[str, bytes]  # under its path: what the manifest lists, and the pages that were rendered from it
    manifest: bytes  # as it was published, of whichever schema


def versions(root: Path, name: str) -> list[str]:
    """Published versions of a model, oldest number first.

    Raises:
        VersionMissing: no model can have this name.
    """
    model = _folder(root, name)
    folders = model.iterdir() if model.is_dir() else ()
    found = [f.name for f in folders if _can_name(f.name) and (f / MANIFEST).is_file()]
    return sorted(found, key=lambda version: (len(version), version))


def current(root: Path, name: str) -> str:
    """The version that `current` names.

    Raises:
        VersionMissing: the store has no such file.
        VersionDamaged: the file names no version.
    """
    path = _folder(root, name) / CURRENT
    try:
        version = path.read_bytes().decode(errors="replace").strip()
    except OSError:
        raise VersionMissing(
            f"no version of {name} is current in {root.resolve()}: train and export one, or set DERMLENS_MODEL_STORE"
        ) from None
    if not _can_name(version):
        raise VersionDamaged(f"{path} names no version but {version[:80]!r}: promote one again")
    return version


def previous(root: Path, name: str) -> str:
    """The version that the current one replaced.

    Raises:
        VersionMissing: no version is current, or it replaced none.
        VersionDamaged: `current` or `previous` cannot be read.
    """
    served = current(root, name)
    path = _folder(root, name) / PREVIOUS
    try:
        return dict(line.split() for line in path.read_text("ascii").splitlines())[served]
    except (FileNotFoundError, KeyError):
        raise VersionMissing(f"nothing to roll back to: {path} has no version that {served} replaced") from None
    except (OSError, ValueError):
        raise VersionDamaged(f"{path} cannot be read: promote the version that you want by its name") from None


def read_manifest(root: Path, name: str, version: str) -> Manifest:
    """The checked manifest of a version; its files are not read.

    Raises:
        VersionMissing, VersionDamaged.
    """
    folder = _folder(root, name, version)
    try:
        manifest, _ = _described(folder)
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(versions(root, name)) or "none"
        raise VersionMissing(f"no version {version!r} of {name} in {root.resolve()}; there: {known}") from None
    if (manifest.name, manifest.version) != (name, version):
        raise VersionDamaged(
            f"{folder / MANIFEST} describes {manifest.name} {manifest.version}: the folder was renamed or copied"
        )
    return manifest


def _described(folder: Path) -> tuple[Manifest, bytes]:
    """The checked manifest of the version in this folder, and the bytes that hold it.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none. VersionDamaged.
    """
    path, checksum = _inside(folder, MANIFEST), _inside(folder, CHECKSUM)
    try:
        data = path.read_bytes()
        published = checksum.read_bytes() if checksum.exists() else _checksum(data)  # older versions have none
        manifest = Manifest.model_validate_json(data)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise VersionDamaged(f"{error.filename or path} cannot be read: {error.strerror}") from None
    except NewerSchema as error:
        raise VersionDamaged(f"{path}: {error}") from None
    except ValidationError as error:
        raise VersionDamaged(f"{path}: {_first_problem(error)}") from None
    if published != _checksum(data):
        raise VersionDamaged(f"{path} is not the published file ({CHECKSUM} differs): restore it, do not serve it")
    return manifest, data


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "restore it from where this version was published"
    said = " ".join(f"{where}: {first['msg']}".split())  # one line, whatever the fields are called
    return said if said.isprintable() else ascii(said)


def report_files(root: Path, name: str, version: str) -> list[str]:
    """Names of the PNG and HTML files of a version's report, what is below a folder or behind a link left out.

    Raises:
        VersionMissing: no version can have this name.
    """
    folder = _folder(root, name, version) / REPORT
    files = folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ()
    return sorted(f.name for f in files if REPORT_FILE.fullmatch(f.name) and f.is_file() and not f.is_symlink())


def read_report(root: Path, name: str, version: str, file: str) -> bytes:
    """One of `report_files`.

    Raises:
        VersionMissing, ReportMissing.
    """
    known = report_files(root, name, version)
    if file not in known:
        raise ReportMissing(f"the report of version {version} has {', '.join(known) or 'no file'}")
    return (_folder(root, name, version) / REPORT / file).read_bytes()


def verify(root: Path, name: str, version: str) -> Manifest:
    """Check size and SHA-256 of every file of a version.

    Raises:
        VersionMissing, VersionDamaged.
    """
    manifest = read_manifest(root, name, version)
    for file in manifest.files:
        _read_verified(_folder(root, name, version), file, manifest)
    return manifest


def load(root: Path, name: str, version: str) -> LoadedVersion:
    """Verify a version and read its weights from the very bytes that were verified.

    Raises:
        VersionMissing, VersionDamaged.
    """
    manifest = read_manifest(root, name, version)
    return _assembled(manifest, _contents(_folder(root, name, version), manifest))


def _contents(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Every file that the manifest lists, verified; those that are needed once, even where it forgets them."""
    abilities = {FAMILIAR: manifest.out_of_distribution, metadata.FILE: manifest.metadata}
    needed = (WEIGHTS, *(file for file, section in abilities.items() if section))
    return {file: _read_verified(folder, file, manifest) for file in dict.fromkeys((*needed, *manifest.files))}


def _assembled(manifest: Manifest, contents: Mapping[str, bytes]) -> LoadedVersion:
    int8 = Int8Graph(*(contents[file] for file in INT8)) if set(INT8) <= set(contents) else None
    try:
        weights = safetensors.numpy.load(contents[WEIGHTS])
        familiar = from_arrays(safetensors.numpy.load(contents[FAMILIAR])) if manifest.out_of_distribution else None
        fusion = None
        if manifest.metadata:
            arrays = safetensors.numpy.load(contents[metadata.FILE])
            fusion = metadata.from_arrays(arrays, classes=len(manifest.classes))
        return LoadedVersion(manifest, weights, int8, familiar, fusion)
    except ValueError as error:
        raise VersionDamaged(f"{manifest.name} {manifest.version}: {error}") from None
    except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy has not
        name = f"{manifest.name} {manifest.version}"
        raise VersionDamaged(f"{name} carries what is not a safetensors file: {error}") from None


def unpack(folder: Path) -> Package:
    """Read and verify a version that lies outside of a store, for `adopt`; its folder may have any name.

    Raises:
        VersionMissing: the folder holds no version. VersionDamaged.
    """
    folder = folder.resolve()
    try:
        manifest, described = _described(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise VersionMissing(
            f"{folder} holds no version, since it has no {MANIFEST}: give a version's folder"
        ) from None
    contents = _contents(folder, manifest)
    found = (path.relative_to(folder).as_posix() for pattern in PAGES for path in sorted(folder.glob(pattern)))
    pages = {file: _inside(folder, file).read_bytes() for file in found if file not in contents}
    return Package(_assembled(manifest, contents), contents | pages, described)


def _can_name(text: str) -> bool:
    try:
        return IDENTIFIER.validate_python(text) not in (CURRENT, PREVIOUS)
    except ValidationError:
        return False


def _folder(root: Path, *names: str) -> Path:
    """The folder of a model, or of one of its versions; a name that could lead elsewhere becomes no path."""
    for name in names:
        if not _can_name(name):
            raise VersionMissing(f"{name[:80]!r} can name no model and no version: use letters, digits, . _ and -")
    return root.joinpath(*names)


def _inside(folder: Path, file: str) -> Path:
    """The path of a version's file, which neither `..` nor a link takes out of the version's folder."""
    home = Path(os.path.realpath(folder.parent), folder.name)
    if not (file.isprintable() and Path(os.path.realpath(folder / file)).is_relative_to(home)):
        raise VersionDamaged(f"{folder} names a file outside its folder: {file!r}")
    return folder / file


def _read_verified(folder: Path, file: str, manifest: Manifest) -> bytes:
    record = manifest.files.get(file)
    if record is None:
        raise VersionDamaged(f"{folder / MANIFEST} lists no {file}")
    path = _inside(folder, file)
    try:  # the size first: a file that grew may not fit in memory
        if path.stat().st_size == record.size and _record(data := path.read_bytes()) == record:
            return data
    except OSError:
        raise VersionDamaged(f"{path} is missing: restore it from where this version was published") from None
    raise VersionDamaged(f"{path} is not the published file (size or SHA-256 differs): restore it, do not serve it")


def _record(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _checksum(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def publish(root: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a new version whole or not at all; the manifest's `files` is filled in here.

    Args:
        files: content under its path in the version's folder; `weights.safetensors` among them.

    Raises:
        VersionExists: the version is published already.
        StoreError: a name or path that no version can have.
    """
    manifest = manifest.model_copy(update={"files": {path: _record(data) for path, data in files.items()}})
    return _write(root, manifest, files, described=manifest.model_dump_json(indent=2).encode())


def adopt(root: Path, package: Package) -> Path:
    """Write a version that was published elsewhere whole or not at all; its manifest stays byte for byte.

    Raises:
        As `publish`.
    """
    return _write(root, package.version.manifest, package.files, described=package.manifest)


def _write(root: Path, manifest: Manifest, files: Mapping[str, bytes], *, described: bytes) -> Path:
    final = _folder(root, manifest.name, manifest.version)
    final.parent.mkdir(parents=True, exist_ok=True)
    _sync_folder(root)
    with _alone(final.parent):
        if final.exists():
            raise VersionExists(f"{final} exists: published versions never change, publish the next number")
        partial = _partial(final)
        _remove(partial)
        for file, data in {**files, MANIFEST: described, CHECKSUM: _checksum(described)}.items():
            path = _inside(partial, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(path, data)
        for folder, _, _ in os.walk(partial):
            _sync_folder(Path(folder))
        os.rename(partial, final)
        _sync_folder(final.parent)
    return final


def promote(root: Path, name: str, version: str) -> None:
    """Make a verified version the served one, atomically, and remember which one it replaced.

    Raises:
        VersionMissing, VersionDamaged: and `current` stays as it was.
    """
    with _alone(_folder(root, name)):
        _make_current(root, name, version)


def rollback(root: Path, name: str) -> str:
    """Promote the version that was current before this one, and return it; twice returns to where one was.

    Raises:
        VersionMissing: there is none, or it is gone. VersionDamaged. `current` stays as it was.
    """
    with _alone(_folder(root, name)):
        version = previous(root, name)
        _make_current(root, name, version)
    return version


def _make_current(root: Path, name: str, version: str) -> None:
    load(root, name, version)
    served = None
    with suppress(StoreError):  # promoting is what repairs a damaged `current`
        served = current(root, name)
    if served and served != version:
        replaced = f"{version} {served}\n"
        with suppress(StoreError):  # kept, so that `previous` is right before and after `current` is replaced
            replaced += f"{served} {previous(root, name)}\n"
        _replace(root / name / PREVIOUS, replaced)
    _replace(root / name / CURRENT, f"{version}\n")


def prune(root: Path, name: str, *, keep: int, also: Collection[str] = ()) -> list[str]:
    """Delete all versions but the newest `keep`, the current, the previous and `also`, and what a kill left over.

    Returns:
        The versions that were removed, in the order of `versions`.

    Raises:
        VersionMissing, VersionDamaged: nobody knows which is current or previous, so nothing is removed.
        ValueError: `keep` is negative.
    """
    if keep < 0:
        raise ValueError("keep: give 0 or more")
    with _alone(_folder(root, name)):
        needed = {current(root, name), *also}
        with suppress(VersionMissing):
            needed.add(previous(root, name))
        for left_over in (root / name).glob(".*.partial"):
            _remove(left_over)
        found = versions(root, name)
        removed = [version for version in found[: max(0, len(found) - keep)] if version not in needed]
        for version in removed:
            folder = _folder(root, name, version)
            os.rename(folder, _partial(folder))
            _sync_folder(folder.parent)  # or a power cut could bring back the name of a half-deleted folder
            _remove(_partial(folder))
    return removed


@contextmanager
def _alone(model: Path) -> Iterator[None]:
    """Wait until no other process changes this model; a lock ends with its process, however that ends."""
    try:
        lock = (model / ".lock").open("w")
    except FileNotFoundError:
        raise VersionMissing(f"no model {model.name} in {model.parent.resolve()}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    _write_synced(_partial(path), text.encode())
    os.replace(_partial(path), path)
    _sync_folder(path.parent)


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
