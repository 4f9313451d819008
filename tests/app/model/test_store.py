import json
import subprocess
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
HEADER = b'{"w":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
UNKNOWN_TYPE = len(HEADER).to_bytes(8, "little") + HEADER + b"\0"  # to NumPy, not to safetensors
ABSTENTION = make_rule(0.1, 0.1).model_dump()


def test_a_published_version_loads_as_it_was_written(small_store: Publish) -> None:
    loaded = store.load(small_store("1"), NAME, "1")
    assert np.array_equal(loaded.weights["w"], np.ones(4, dtype=np.float32))
    assert set(loaded.manifest.files) == {store.WEIGHTS, "report/a.txt"}
    assert loaded.manifest.files["report/a.txt"].size == 1


def test_an_int8_graph_is_loaded_where_both_its_files_are(small_store: Publish) -> None:
    xml, weights = store.INT8
    root = small_store("1")
    tiny = {store.WEIGHTS: (root / NAME / "1" / store.WEIGHTS).read_bytes()}
    store.publish(root, make_manifest("2"), tiny | {xml: b"<net/>", weights: b"\1\2"})
    store.publish(root, make_manifest("3"), tiny | {xml: b"<net/>"})
    assert store.load(root, NAME, "2").int8 == (b"<net/>", b"\1\2")
    assert [store.load(root, NAME, version).int8 for version in ("1", "3")] == [None, None]


def test_the_first_version_makes_the_folders_of_its_store(tmp_path: Path) -> None:
    store.publish(tmp_path / "a" / "store", make_manifest("1"), {store.WEIGHTS: b""})
    assert store.versions(tmp_path / "a" / "store", NAME) == ["1"]


def test_a_file_may_lie_in_a_folder_of_a_folder(small_store: Publish) -> None:
    root = small_store("1")
    store.publish(root, make_manifest("2"), {store.WEIGHTS: b"", "report/plots/roc.svg": b"<svg/>"})
    assert set(store.verify(root, NAME, "2").files) == {store.WEIGHTS, "report/plots/roc.svg"}
    assert (root / NAME / "2" / "report/plots/roc.svg").read_bytes() == b"<svg/>"


def test_a_report_gives_its_pictures_and_pages_and_nothing_else(small_store: Publish) -> None:
    root = small_store("1")
    report = root / NAME / "1" / "report"
    (report / "roc.png").write_bytes(b"png")  # rendered after publishing
    (report / "report.html").write_bytes(b"html")
    (report / "deeper").mkdir()
    (report / "deeper" / "a.png").write_bytes(b"png")
    (report / "link.png").symlink_to(root / NAME / "1" / store.WEIGHTS)
    assert store.report_files(root, NAME, "1") == ["report.html", "roc.png"]
    assert store.read_report(root, NAME, "1", "roc.png") == b"png"
    for file in ("a.txt", "link.png", "deeper/a.png", "../manifest.json", "../report/roc.png", "roc.png\n", "", "."):
        with pytest.raises(store.ReportMissing, match=r"has report\.html, roc\.png"):
            store.read_report(root, NAME, "1", file)
    for version in ("9", "..", ".", "1/report"):
        with pytest.raises(store.StoreError):
            store.read_report(root, NAME, version, "roc.png")


def test_a_report_that_is_a_link_is_none(small_store: Publish, tmp_path: Path) -> None:
    root = small_store("1")
    elsewhere = tmp_path / "elsewhere"
    (root / NAME / "1" / "report").rename(elsewhere)
    (elsewhere / "a.png").write_bytes(b"png")
    (root / NAME / "1" / "report").symlink_to(elsewhere)
    assert store.report_files(root, NAME, "1") == []


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
    (path.parent / store.CHECKSUM).unlink()
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
    """As if version 1 had been published so."""
    path = root / NAME / "1" / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / store.CHECKSUM).unlink()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"schema_version": 99, "surprise": 1}, "schema 99 is newer than "),
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


@pytest.mark.parametrize("weights", [b"", b"\x80\x04pickled", UNKNOWN_TYPE])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, weights: bytes) -> None:
    store.publish(tmp_path, make_manifest(), {store.WEIGHTS: weights})
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


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    assert store.versions(tmp_path, NAME) == []
    with pytest.raises(VersionMissing, match="DERMLENS_MODEL_STORE"):
        store.current(tmp_path, NAME)


def test_the_manifests_checksum_is_one_that_sha256sum_reads(small_store: Publish) -> None:
    folder = small_store("1") / NAME / "1"
    subprocess.run(["sha256sum", "--strict", "-c", store.CHECKSUM], cwd=folder, check=True)  # noqa: S607


@pytest.mark.parametrize("version", ["current", "previous", "../2", "2\n"])
def test_a_version_that_would_be_in_the_way_is_not_published(small_store: Publish, version: str) -> None:
    root = small_store("1")
    with pytest.raises(StoreError, match="can name no model and no version"):
        store.publish(root, make_manifest().model_copy(update={"version": version}), {store.WEIGHTS: b""})
    assert store.versions(root, NAME) == ["1"]


@pytest.mark.parametrize("file", ["../1/x", "/tmp/x", "report/../../x", "a\0b"])  # noqa: S108
def test_a_file_outside_the_versions_folder_is_not_published(small_store: Publish, file: str) -> None:
    root = small_store("1")
    with pytest.raises(StoreError, match="outside its folder"):
        store.publish(root, make_manifest("2"), {store.WEIGHTS: b"", file: b""})
    assert store.versions(root, NAME) == ["1"]


def test_a_version_holds_nothing_of_an_earlier_attempt(small_store: Publish) -> None:
    left_over = small_store("1") / NAME / ".2.partial"
    left_over.mkdir()
    (left_over / "stray").touch()
    assert not (small_store("2") / NAME / "2" / "stray").exists()


def promoted(publish: Publish, *versions: str) -> Path:
    root = publish(*versions)
    for version in versions:
        store.promote(root, NAME, version)
    return root


def test_rolling_back_returns_to_the_version_before_and_twice_to_where_one_was(small_store: Publish) -> None:
    root = promoted(small_store, "1", "2", "3")
    assert [store.rollback(root, NAME) for _ in range(3)] == ["2", "3", "2"]
    assert store.current(root, NAME) == "2"
    assert store.previous(root, NAME) == "3"


def test_promoting_the_current_version_again_keeps_the_previous_one(small_store: Publish) -> None:
    root = promoted(small_store, "1", "2")
    store.promote(root, NAME, "2")
    assert store.rollback(root, NAME) == "1"


def test_the_first_version_has_nothing_to_roll_back_to(small_store: Publish) -> None:
    root = promoted(small_store, "1")
    with pytest.raises(VersionMissing, match="nothing to roll back to"):
        store.rollback(root, NAME)
    assert store.current(root, NAME) == "1"


def test_a_version_that_was_made_current_by_hand_has_nothing_to_roll_back_to(small_store: Publish) -> None:
    root = promoted(small_store, "1", "2")
    small_store("3")
    (root / NAME / "current").write_text("3\n")
    with pytest.raises(VersionMissing, match="nothing to roll back to"):
        store.rollback(root, NAME)


def test_prune_keeps_the_newest_the_current_and_the_previous_version(small_store: Publish) -> None:
    root = small_store("1", "2", "3", "4", "5", "10")
    for version in ("5", "2", "3"):
        store.promote(root, NAME, version)
    assert store.prune(root, NAME, keep=1) == ["1", "4", "5"]
    assert store.versions(root, NAME) == ["2", "3", "10"]
    assert store.rollback(root, NAME) == "2"
    assert store.prune(root, NAME, keep=0) == ["10"]
    assert store.prune(root, NAME, keep=5) == []


def test_prune_removes_nothing_where_there_are_fewer_than_to_keep(small_store: Publish) -> None:
    root = small_store("1", "2")
    store.promote(root, NAME, "2")  # and nobody needs 1
    assert store.prune(root, NAME, keep=5) == []
    assert store.versions(root, NAME) == ["1", "2"]


def test_prune_keeps_what_else_it_is_told_to(small_store: Publish) -> None:
    root = small_store("1", "2", "3", "4")
    store.promote(root, NAME, "4")
    assert store.prune(root, NAME, keep=1, also={"2", "current", "9"}) == ["1", "3"]
    assert store.versions(root, NAME) == ["2", "4"]


def test_prune_refuses_to_keep_fewer_than_none(small_store: Publish) -> None:
    root = promoted(small_store, "1")
    with pytest.raises(ValueError, match=r"^keep: give 0 or more$"):
        store.prune(root, NAME, keep=-1)


@pytest.mark.parametrize("file", ["current", "previous"])
def test_prune_removes_nothing_where_nobody_knows_what_is_needed(small_store: Publish, file: str) -> None:
    root = promoted(small_store, "1", "2", "3")
    (root / NAME / file).write_bytes(b"\xff")
    with pytest.raises(VersionDamaged):
        store.prune(root, NAME, keep=0)
    assert store.versions(root, NAME) == ["1", "2", "3"]


def test_prune_removes_what_a_kill_left_over_and_no_other_hidden_folder(small_store: Publish) -> None:
    root = promoted(small_store, "1")
    for folder in (".2.partial", ".1.partial", ".git"):
        (root / NAME / folder / "report").mkdir(parents=True)
    (root / NAME / ".current.partial").write_text("")
    store.prune(root, NAME, keep=1)
    assert {path.name for path in (root / NAME).iterdir()} == {"1", "current", ".git", ".lock"}


@pytest.mark.parametrize(
    ("use", "arguments"), [(store.promote, {"version": "1"}), (store.rollback, {}), (store.prune, {"keep": 1})]
)
def test_a_model_that_is_not_there_is_missing_and_not_created(
    tmp_path: Path, use: Callable[..., object], arguments: dict[str, Any]
) -> None:
    with pytest.raises(VersionMissing, match=f"no model {NAME}"):
        use(tmp_path, NAME, **arguments)
    assert not (tmp_path / NAME).exists()


def test_a_version_made_elsewhere_is_adopted_byte_for_byte(small_store: Publish, tmp_path: Path) -> None:
    made = small_store("1") / NAME / "1"
    for page in ("MODEL_CARD.md", "report/report.html", "report/roc.png"):
        (made / page).write_text(page)  # as `training.report` does after publishing
    (made / "checkpoint.bin").write_bytes(b"no part of a version")
    copied = made.rename(tmp_path / "copied from the training host")
    package = store.unpack(copied)
    folder = store.adopt(tmp_path / "store", package)
    assert folder == tmp_path / "store" / NAME / "1"
    assert np.array_equal(package.version.weights["w"], store.load(tmp_path / "store", NAME, "1").weights["w"])
    (copied / "checkpoint.bin").unlink()
    files = [path.relative_to(copied) for path in copied.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert all((copied / file).read_bytes() == (folder / file).read_bytes() for file in files)
    with pytest.raises(VersionExists, match="published versions never change"):
        store.adopt(tmp_path / "store", package)


def test_a_folder_without_a_version_is_no_package(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(VersionMissing, match=r"holds no version, since it has no manifest\.json"):
            store.unpack(folder)


def test_a_page_that_leads_out_of_its_folder_is_not_adopted(small_store: Publish) -> None:
    made = small_store("1") / NAME / "1"
    (made / "MODEL_CARD.md").symlink_to("/etc/hostname")
    with pytest.raises(VersionDamaged, match="outside its folder"):
        store.unpack(made)
