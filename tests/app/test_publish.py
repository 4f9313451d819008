"""`dermlens models publish`: a version made elsewhere comes into the store whole and running, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from app.model import store
from tests.app.model.test_store_faults import DAMAGES
from tests.app.test_cli import run
from tests.conftest import NAME, make_manifest

HASHED = (store.MANIFEST, store.WEIGHTS)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store of the GPU host"
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(root))
    monkeypatch.setenv("DERMLENS_COVERAGE", "0.90")
    return root


@pytest.fixture
def copied(careful_store: Path, tmp_path: Path) -> Path:
    """Version 1, real but for its weights, as it came from a training host."""
    return shutil.copytree(careful_store / NAME / "1", tmp_path / "from-training")


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why."""
    assert run("models", "publish", folder) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dermlens: ")]
    return line


def test_it_is_published_and_current_where_that_is_asked_for(
    root: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "publish", copied, "--promote") == 0
    out, err = capsys.readouterr()
    assert out == f"published {root / NAME / '1'}, and is current\n"
    assert len(err.splitlines()) == 3  # steps
    assert store.current(root, NAME) == "1"
    assert (root / NAME / "1" / store.MANIFEST).read_bytes() == (copied / store.MANIFEST).read_bytes()
    store.verify(root, NAME, "1")


def test_it_is_not_current_unless_asked_for_and_comes_once(
    root: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "publish", copied) == 0
    assert "is not current" in capsys.readouterr().out
    assert store.versions(root, NAME) == ["1"]
    assert not (root / NAME / store.CURRENT).exists()
    assert f"{NAME} 1 is in {root} already" in refused(copied, capsys)


@pytest.mark.parametrize("promoted", [True, False])
def test_it_is_told_as_json(root: Path, copied: Path, capsys: pytest.CaptureFixture[str], promoted: bool) -> None:
    assert run("models", "publish", copied, "--json", *(["--promote"] if promoted else [])) == 0
    (line,) = capsys.readouterr().out.splitlines()
    folder = str(root / NAME / "1")
    assert json.loads(line) == {"name": NAME, "version": "1", "folder": folder, "current": promoted}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", HASHED)
def test_a_folder_that_was_damaged_on_its_way_is_refused(
    root: Path, copied: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    DAMAGES[damage](copied / file)
    assert file in refused(copied, capsys) or damage == "a folder"
    assert not root.exists()


def test_a_flipped_bit_of_any_file_is_refused(root: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (*HASHED, store.CHECKSUM):
        sound = (copied / file).read_bytes()
        (copied / file).write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
        assert str(copied / store.MANIFEST) in (line := refused(copied, capsys)) or file in line
        (copied / file).write_bytes(sound)
    assert not root.exists()


def test_a_version_of_another_model_is_refused_by_both_names(
    root: Path, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_NAME", "other")
    assert f"is {NAME} 1, and no other: set DERMLENS_MODEL_NAME={NAME}" in refused(copied, capsys)
    assert not root.exists()


def broken(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights | {"head.fc2.bias": np.full(2, np.nan, dtype=np.float32)}


def unfit(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if name != "head.fc2.bias"}


@pytest.mark.parametrize(("change", "says"), [(broken, "no finite answer"), (unfit, "do not fit")])
def test_a_version_that_does_not_run_is_refused_though_its_files_are_as_they_were_published(
    root: Path,
    tmp_path: Path,
    careful_store: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    says: str,
) -> None:
    loaded = store.load(careful_store, NAME, "1")
    changed = safetensors.numpy.save(change(loaded.weights))
    made = store.publish(tmp_path / "made", loaded.manifest, {store.WEIGHTS: changed})
    assert says in refused(made, capsys)
    assert not root.exists()


def test_a_version_of_a_newer_program_says_to_upgrade(
    root: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / store.MANIFEST
    schema = f'"schema_version": {make_manifest().schema_version}'
    path.write_text(path.read_text().replace(schema, '"schema_version": 99'))
    assert "upgrade dermlens" in refused(copied, capsys)
    assert not root.exists()
