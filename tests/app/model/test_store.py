import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.model import store
from app.model.manifest import Metric
from app.model.store import StoreError, VersionDamaged, VersionExists, VersionMissing
from tests.conftest import NAME, make_manifest, make_rule

Publish = Callable[..., Path]
ABSTENTION = make_rule(0.1, 0.1).model_dump()


def test_a_published_version_loads_as_it_was_written(small_store: Publish) -> None:
    loaded = store.load(small_store("1"), NAME, "1")
    assert np.array_equal(loaded.weights["w"], np.ones(4, dtype=np.float32))
    assert set(loaded.manifest.files) == {store.WEIGHTS, "report/a.txt"}
    assert loaded.manifest.files["report/a.txt"].size == 1


@pytest.mark.parametrize("file", [store.WEIGHTS, "report/a.txt"])
def test_a_changed_byte_is_refused(small_store: Publish, file: str) -> None:
    root = small_store("1")
    path = root / NAME / "1" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for use in (store.load, store.verify, store.promote):
        with pytest.raises(VersionDamaged, match=f"{file} is not the published file"):
            use(root, NAME, "1")


def test_a_missing_file_is_refused(small_store: Publish) -> None:
    root = small_store("1")
    (root / NAME / "1" / store.WEIGHTS).unlink()
    with pytest.raises(VersionDamaged, match=r"weights\.safetensors is missing"):
        store.load(root, NAME, "1")


def test_a_missing_version_is_refused_and_the_known_ones_named(small_store: Publish) -> None:
    with pytest.raises(VersionMissing, match="there: 1, 2, 10"):
        store.load(small_store("1", "10", "2"), NAME, "3")


def test_a_manifest_from_before_abstention_still_loads(small_store: Publish) -> None:
    root = small_store("1")
    path = root / NAME / "1" / store.MANIFEST
    fields = json.loads(path.read_text())
    for later in ("abstention", "external_metrics", "calibrated_on"):
        del fields[later]
    path.write_text(json.dumps(fields))
    manifest = store.load(root, NAME, "1").manifest
    assert (manifest.abstention, manifest.external_metrics, manifest.calibrated_on) == ({}, {}, "")


def test_an_abstention_rule_is_read_as_it_was_published(tmp_path: Path) -> None:
    metric = Metric(value=0.8, low=0.7, high=0.9)
    later: dict[str, Any] = {
        "abstention": {"0.90": make_rule(0.2, 0.3)},
        "external_metrics": {"clinics": {"roc_auc": metric}},
        "calibrated_on": "fold 0",
    }
    store.publish(tmp_path, make_manifest(**later), {store.WEIGHTS: b""})
    manifest = store.read_manifest(tmp_path, NAME, "1")
    assert manifest.abstention["0.90"].quantiles == {"benign": 0.2, "malignant": 0.3}
    assert (manifest.external_metrics, manifest.calibrated_on) == ({"clinics": {"roc_auc": metric}}, "fold 0")


def edit(root: Path, **changes: object) -> None:
    path = root / NAME / "1" / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"temperature": 0}, "temperature"),
        ({"operating_points": {}}, "balanced"),
        (
            {"abstention": {"0.95": ABSTENTION | {"quantiles": {"benign": 0.1}}}},
            "0.95: the quantiles are not those of ben",
        ),
        ({"abstention": {"0.95": ABSTENTION | {"quantiles": {"benign": 0.1, "malignant": 1.1}}}}, "malignant"),
        ({"abstention": {"95%": ABSTENTION}}, "abstention.95%"),
        ({"version": "7"}, "describes"),
        ({"files": {}}, r"lists no weights\.safetensors"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(small_store: Publish, changes: dict[str, object], word: str) -> None:
    root = small_store("1")
    edit(root, **changes)
    with pytest.raises(VersionDamaged, match=word):
        store.load(root, NAME, "1")


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname"])
def test_a_manifest_cannot_reach_outside_its_folder(small_store: Publish, name: str) -> None:
    root = small_store("1")
    manifest = store.read_manifest(root, NAME, "1")
    record = manifest.files[store.WEIGHTS].model_dump()
    edit(root, files={store.WEIGHTS: record, name: record})
    with pytest.raises(VersionDamaged, match="outside its folder"):
        store.verify(root, NAME, "1")


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    store.publish(tmp_path, make_manifest(), {store.WEIGHTS: b"\x80\x04pickled"})
    with pytest.raises(VersionDamaged, match="not a safetensors file"):
        store.load(tmp_path, NAME, "1")


def test_a_published_version_never_changes(small_store: Publish) -> None:
    root = small_store("1")
    before = (root / NAME / "1" / store.MANIFEST).read_bytes()
    with pytest.raises(VersionExists, match="publish the next number"):
        store.publish(root, make_manifest("1"), {store.WEIGHTS: b""})
    assert (root / NAME / "1" / store.MANIFEST).read_bytes() == before


def test_promote_changes_current_and_a_bad_version_leaves_it(small_store: Publish) -> None:
    root = small_store("1", "2")
    store.promote(root, NAME, "1")
    store.promote(root, NAME, "2")
    assert store.current(root, NAME) == "2"
    (root / NAME / "1" / store.WEIGHTS).write_bytes(b"")
    with pytest.raises(StoreError):
        store.promote(root, NAME, "1")
    assert store.current(root, NAME) == "2"


def test_promote_refuses_what_could_not_be_loaded(small_store: Publish) -> None:
    root = small_store("1")
    store.publish(root, make_manifest("2"), {store.WEIGHTS: b"no safetensors"})
    with pytest.raises(VersionDamaged):
        store.promote(root, NAME, "2")
    assert not (root / NAME / "current").exists()


def test_a_publish_that_dies_leaves_no_version(small_store: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_store("1")

    def die(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", die)
        with pytest.raises(OSError, match="power cut"):
            store.publish(root, make_manifest("2"), {store.WEIGHTS: b"x"})
    assert store.versions(root, NAME) == ["1"]
    store.publish(root, make_manifest("2"), {store.WEIGHTS: b"x"})
    assert store.versions(root, NAME) == ["1", "2"]


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    assert store.versions(tmp_path, NAME) == []
    with pytest.raises(VersionMissing, match="DERMLENS_MODEL_STORE"):
        store.current(tmp_path, NAME)
