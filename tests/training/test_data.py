from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.model.preprocess import decode
from tests.conftest import encode, framed, needs_real_data
from training.config import Data
from training.data import Dataset, assign_folds, load_dataset, near_duplicates
from training.drawn import draw_lesion


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of twelve files, each with a turned twin of its first image."""
    for kind, name in enumerate(("benign", "malignant")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(12):
            draw_lesion(kind, number).save(tmp_path / "set" / name / f"{number:02d}.png")
        twin = draw_lesion(kind, 0).transpose(Image.Transpose.ROTATE_90).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        twin.save(tmp_path / "set" / name / "99.png")
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    return tmp_path / "set"


def load(**options: object) -> Dataset:
    return load_dataset(Data(root="set", folds=3, **options), seed=1, progress=False)


def test_images_are_decoded_as_serving_decodes_them(folder: Path) -> None:
    dataset = load()
    assert dataset.names[0] == "benign/00.png"
    assert np.array_equal(dataset.images[0].numpy(), decode((folder / "benign" / "00.png").read_bytes()).pixels)
    assert dataset.labels.tolist() == [0] * 13 + [1] * 13


def test_frames_are_cropped_where_the_config_says_so_and_folds_are_the_same(folder: Path) -> None:
    path = folder / "benign" / "00.png"
    framed(draw_lesion(0, 0)).save(path)
    kept, cropped = load(), load(crop_frame=True)
    assert np.array_equal(kept.images[0].numpy(), decode(path.read_bytes()).pixels)
    assert np.array_equal(cropped.images[0].numpy(), decode(path.read_bytes(), crop_frame=True).pixels)
    assert not torch.equal(kept.images[0], cropped.images[0])
    assert torch.equal(kept.images[1:], cropped.images[1:])
    assert np.array_equal(kept.folds, cropped.folds)
    assert kept.fingerprint == cropped.fingerprint


@pytest.mark.usefixtures("folder")
def test_turned_twins_share_a_fold_and_every_fold_has_both_classes() -> None:
    dataset = load()
    for first, twin in ((0, 12), (13, 25)):
        assert dataset.folds[first] == dataset.folds[twin]
    for fold in range(3):
        split = dataset.split(fold)
        assert sorted([*split.training, *split.held_out]) == list(range(26))
        assert set(dataset.labels[split.held_out].tolist()) == {0, 1}
    assert len(dataset.split(-1).training) == 26


def test_a_second_folder_joins_without_the_twins_of_the_first(folder: Path) -> None:
    alone = load()
    for kind, name in enumerate(("benign", "malignant")):
        (folder.parent / "other" / name).mkdir(parents=True)
        draw_lesion(kind, 5).transpose(Image.Transpose.ROTATE_180).save(folder.parent / "other" / name / "twin.png")
        for number in range(100, 106):
            draw_lesion(kind, number).save(folder.parent / "other" / name / f"{number}.png")
    both = load(extra="other")
    assert [name for name in both.names if "twin" in name] == []
    assert both.names[:26] == alone.names
    assert np.array_equal(both.folds[:26], alone.folds)
    assert both.fingerprint != alone.fingerprint
    assert both.root_fingerprint == alone.root_fingerprint == alone.fingerprint
    assert both.extra.sum() == 12
    split = both.split(0)
    assert len(split.held_out_extra) == 4
    assert both.extra[split.held_out_extra].all()
    assert not both.extra[split.held_out].any()
    assert sorted([*split.training, *split.held_out, *split.held_out_extra]) == list(range(38))


def test_twins_of_what_a_start_has_seen_are_left_out(folder: Path) -> None:
    (folder.parent / "seen" / "anywhere").mkdir(parents=True)
    draw_lesion(0, 3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder.parent / "seen" / "anywhere" / "x.png")
    everything, rest = load(), load(without=["seen"])
    gone = set(everything.names) - set(rest.names)
    assert len(gone) >= 1
    assert all(name.startswith("benign/") for name in gone)
    with pytest.raises(ValueError, match="the twins of what the start has seen"):
        load(without=["absent"])


def test_the_fingerprint_changes_with_one_byte_and_not_otherwise(folder: Path) -> None:
    before = load().fingerprint
    assert load().fingerprint == before
    draw_lesion(0, 77).save(folder / "benign" / "05.png")
    assert load().fingerprint != before


def test_only_real_duplicates_are_grouped() -> None:
    images = [draw_lesion(k, n) for k in (0, 1) for n in range(5)]
    brighter = images[3].point(lambda v: min(255, int(v * 1.1)))
    stack = torch.stack([torch.from_numpy(decode(encode(i)).pixels) for i in [*images, brighter]])
    groups = near_duplicates(stack)
    assert groups[3] == groups[10]
    assert len(set(groups.tolist())) == 10


@pytest.mark.parametrize(
    ("classes", "says"), [(["benign", "mole"], "no folder"), (["benign", "empty"], "holds no JPEG")]
)
def test_a_missing_or_empty_folder_is_named(folder: Path, classes: list[str], says: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=says):
        load(classes=classes)


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "benign" / "03.png").write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"benign/03\.png: the upload is not an image"):
        load()


@needs_real_data
def test_real_folds_keep_near_duplicates_together() -> None:
    dataset = load_dataset(Data(root="isic2020/train"), seed=42, progress=False)
    assert len(dataset.images) == 2637
    groups = near_duplicates(dataset.images)
    for group in set(groups.tolist()):
        assert len(set(dataset.folds[groups == group].tolist())) == 1
    assert 2500 < len(set(groups.tolist())) < 2637
    again = assign_folds(groups, dataset.labels.numpy(), folds=5, seed=42)
    assert np.array_equal(again, dataset.folds)


@pytest.fixture
def scope(folder: Path) -> str:
    """A folder of images through one dermoscope, pale lesions on pale skin, that only their frame makes alike."""
    for kind, name in enumerate(("benign", "malignant")):
        (folder.parent / "scope" / name).mkdir(parents=True)
        for number in range(9):
            pale = Image.blend(draw_lesion(kind, 200 + number), Image.new("RGB", (224, 224), (230, 190, 170)), 0.7)
            framed(pale).save(folder.parent / "scope" / name / f"{number}.png")
    return "scope"


def test_a_frame_makes_nobody_a_twin(scope: str) -> None:
    with pytest.raises(ValueError, match="number of groups: 1"):
        load_dataset(Data(root=scope, folds=3), seed=1, progress=False)
    second = load(extra=scope, lit_folds=["extra"])
    assert second.extra.sum() == 18
    assert [len(second.split(fold).held_out_extra) for fold in range(3)] == [6, 6, 6]
    alone = load_dataset(Data(root=scope, folds=3, lit_folds=["root"]), seed=1, progress=False)
    assert np.array_equal(np.bincount(alone.folds), [6, 6, 6])
