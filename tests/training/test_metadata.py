import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from app.model import metadata, store
from app.model.manifest import Metric, Preprocessing
from app.model.metadata import FIELDS, PLACES, SITES, WIDTH, Metadata
from tests.conftest import NAME, ROOT, careful_manifest, encode
from training import metadata as study
from training.config import load_config
from training.data import load_dataset
from training.drawn import MISSING, draw_cases, draw_lesion
from training.metadata import DROPOUT, Cases, compare, drop_fields, fit, read_table, refuse_trained_on, roc_aucs

TEMPERATURE = 1.5


def people(count: int, *, seed: int, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N,2] that tell a little, encodings with gaps, and labels that lean on age and site by `effect`."""
    rng = np.random.default_rng(seed)
    ages, sexes, sites = rng.uniform(20, 90, count), rng.integers(2, size=count), rng.integers(len(SITES), size=count)
    leaning = effect * ((ages - 55) / 15 + np.where(sites % 2, 1.2, -1.2))
    labels = (rng.random(count) < 1 / (1 + np.exp(-leaning))).astype(np.int64)
    evidence = (labels - 0.5) + rng.normal(0, 1, count)  # the log-odds of its class, times T below
    logits = np.stack([np.zeros(count), TEMPERATURE * evidence], axis=1).astype(np.float32)
    known = rng.random((count, 3)) > 0.2
    codes = [
        Metadata(
            age=float(age) if has[0] else None,
            sex=metadata.SEXES[sex] if has[1] else None,
            site=SITES[site] if has[2] else None,
        ).encode()
        for age, sex, site, has in zip(ages, sexes, sites, known, strict=True)
    ]
    return logits, np.stack(codes), labels


def gains(effect: float) -> dict[str, Metric]:
    logits, codes, labels = people(1500, seed=0, effect=effect)
    fusion = fit(logits, codes, labels, temperature=TEMPERATURE)
    logits, codes, labels = people(1500, seed=1, effect=effect)
    return compare(fusion, logits, codes, labels, fields=FIELDS)[1]


def test_it_helps_where_the_label_depends_on_it_and_less_of_it_helps_less() -> None:
    found = gains(1)
    assert found["all fields"].low > 0.05
    for field in ("age", "site"):
        assert 0 < found[f"no {field}"].low < found[f"no {field}"].value < found["all fields"].low
    assert found["no sex"].value == pytest.approx(found["all fields"].value, abs=0.01)
    assert found["image alone"] == Metric(value=0, low=0, high=0)


def test_it_gains_nothing_where_the_label_does_not_depend_on_it() -> None:
    found = gains(0)
    assert found["all fields"].low <= 0.005
    assert abs(found["all fields"].value) < 0.02


def test_dropout_takes_whole_fields_and_at_times_all_of_them() -> None:
    code = torch.from_numpy(Metadata(age=80, sex="male", site="head/neck").encode()).expand(4000, WIDTH)
    dropped = drop_fields(code, torch.Generator().manual_seed(0))
    gone = torch.stack([(dropped[:, PLACES[field]] == 0).all(dim=1) for field in FIELDS], dim=1)
    kept = torch.stack([(dropped[:, PLACES[f]] == code[:, PLACES[f]]).all(dim=1) for f in FIELDS], dim=1)
    assert torch.equal(gone, ~kept)
    assert gone.float().mean(dim=0).tolist() == pytest.approx([DROPOUT] * 3, abs=0.03)
    assert gone.all(dim=1).float().mean().item() == pytest.approx(DROPOUT**3, abs=0.01)


def test_the_same_seed_fits_the_same_head() -> None:
    logits, codes, labels = people(100, seed=0, effect=1)
    one, two = (fit(logits, codes, labels, temperature=TEMPERATURE).arrays() for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_areas_are_those_of_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=200), rng.integers(9, size=(200, 3)).astype(np.float64)
    assert roc_aucs(labels, scores) == pytest.approx([roc_auc_score(labels, column) for column in scores.T])


def test_drawn_cases_lean_on_age_and_site_alone_and_have_gaps() -> None:
    cases = list(draw_cases(600, seed=0, effect=2))
    labels = np.array([case.label for case in cases])
    known = [case.metadata for case in cases]
    ages = np.array([np.nan if one.age is None else one.age for one in known])
    males = np.array([np.nan if one.sex is None else one.sex == "male" for one in known])
    assert np.nanmean(ages[labels == 1]) > np.nanmean(ages[labels == 0]) + 10
    assert np.nanmean(males[labels == 1]) == pytest.approx(np.nanmean(males[labels == 0]), abs=0.15)
    assert np.isnan(ages).mean() == pytest.approx(MISSING, abs=0.06)
    assert [case.image for case in draw_cases(3, seed=0)] == [case.image for case in draw_cases(3, seed=0)]


SMALL = Preprocessing(size=64, resize="squash-bilinear", mean=(0, 0, 0), std=(1, 1, 1))


def write_table(folder: Path, *lines: str, header: str = "image,age,sex,site,label") -> Path:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encode(draw_lesion(number % 2, number, size=(96, 96))))
    path = folder / "clinic.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return path


def test_a_table_is_read_with_its_gaps(tmp_path: Path) -> None:
    path = write_table(tmp_path, "0.png,45.0,female,head/neck,benign", "1.png,,,,malignant")
    cases = read_table(path, classes=("benign", "malignant"), prepared=SMALL)
    assert cases.images.shape == (2, 3, 64, 64)
    assert cases.labels.tolist() == [0, 1]
    assert cases.known == [Metadata(45, "female", "head/neck"), Metadata()]
    assert "clinic.csv" in cases.source


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("1.png,old,female,head/neck,benign", "line 3: could not convert"),
        ("1.png,130,female,head/neck,benign", "line 3: age: give 0 to 120"),
        ("1.png,13,f,head/neck,benign", "line 3: sex: give female or male"),
        ("1.png,13,female,elbow,benign", "line 3: site: give one of"),
        ("1.png,13,female,head/neck,naevus", "line 3: label: give one of benign, malignant"),
        ("9.png,13,female,head/neck,benign", "line 3: .*No such file"),
        ("clinic.csv,13,female,head/neck,benign", "line 3: the upload is not an image"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = write_table(tmp_path, "0.png,45,female,head/neck,benign", line)
    with pytest.raises(ValueError, match=word):
        read_table(path, classes=("benign", "malignant"), prepared=SMALL)


def test_a_table_without_a_column_or_without_a_line_is_refused(tmp_path: Path) -> None:
    for header, word in (("image,age,sex,label", "has no column site"), ("image,age,sex,site,label", "names no image")):
        with pytest.raises(ValueError, match=word):
            read_table(write_table(tmp_path, header=header), classes=("benign", "malignant"), prepared=SMALL)


def test_a_version_is_published_with_its_head_and_its_figures(
    tmp_path: Path, random_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "store", tmp_path / "evidence"
    store.publish(root, careful_manifest(), {store.WEIGHTS: random_weights, "report/a.txt": b"a"})
    source = ["--version", str(root / NAME / "1"), "--out", str(out), "--drawn", "60"]
    study.main(source)
    assert store.versions(root, NAME) == ["1"]
    study.main([*source, "--publish", str(tmp_path / "other")])
    assert "experimental" in capsys.readouterr().out
    loaded = store.load(tmp_path / "other", NAME, "1")
    about = loaded.manifest.metadata
    assert about is not None
    assert loaded.fusion is not None
    assert set(loaded.manifest.files) == {store.WEIGHTS, "report/a.txt", metadata.FILE}
    halves = [int(words.split()[0]) for words in (about.trained_on, about.held_out)]
    assert sum(halves) == 60
    assert "drawn lesions" in about.trained_on
    with (out / "metadata.csv").open() as file:
        rows = {row["known"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"image alone", "all fields", "no age", "no sex", "no site"}
    assert rows["all fields"]["gain"] == f"{about.gain['all fields'].value:.4f}"
    assert rows["image alone"]["images"] == str(halves[1])


def test_what_it_cannot_be_fitted_on_is_refused(tmp_path: Path, random_weights: bytes) -> None:
    three = careful_manifest(version="3").model_copy(update={"classes": ("a", "b", "c"), "abstention": {}})
    store.publish(tmp_path, careful_manifest(), {store.WEIGHTS: random_weights})
    store.publish(tmp_path, three, {store.WEIGHTS: random_weights})
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    untold = Cases(images, np.array([0, 1] * 4), [Metadata()] * 8, np.arange(8), "none")
    with pytest.raises(ValueError, match="other than two classes"):
        study.run(tmp_path / NAME / "3", untold, tmp_path)
    with pytest.raises(ValueError, match="nothing is known of any image"):
        study.run(tmp_path / NAME / "1", untold, tmp_path)
    alike = untold._replace(labels=np.zeros(8, np.int64), known=[Metadata(age=50)] * 8)
    with pytest.raises(ValueError, match="both classes"):
        study.run(tmp_path / NAME / "1", alike, tmp_path)


def test_images_that_trained_the_version_are_refused(tmp_path: Path, random_weights: bytes) -> None:
    config = load_config(ROOT / "training" / "configs" / "smoke.toml")
    dataset = load_dataset(config.data, seed=config.seed, progress=False)
    split = careful_manifest().split
    for version, fingerprint in (("1", dataset.fingerprint), ("2", "0" * 64)):
        changed = split.model_copy(update={"fingerprint": fingerprint, "held_out_fold": 0})
        manifest = careful_manifest(version=version, split=changed, training_config=config.model_dump(mode="json"))
        store.publish(tmp_path, manifest, {store.WEIGHTS: random_weights})
    held = dataset.split(0).held_out

    def cases(members: list[int]) -> Cases:
        images = dataset.images[members]
        return Cases(images, np.zeros(len(members), dtype=np.int64), [Metadata()] * len(members), np.arange(1), "none")

    assert refuse_trained_on(tmp_path / NAME / "1", cases(held.tolist()))
    seen = int(dataset.split(0).training[0])
    with pytest.raises(ValueError, match="1 of the images trained"):
        refuse_trained_on(tmp_path / NAME / "1", cases([*held.tolist(), seen]))
    assert not refuse_trained_on(tmp_path / NAME / "2", cases([seen]))  # whose images are not here
