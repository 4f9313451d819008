"""Folds of one recipe, and a version of all images that carries their figures."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from app.model import store
from tests.conftest import NAME
from tests.training.test_train import short
from training.backbones import build
from training.calibrate import cross_fitted
from training.checkpoint import CHECKPOINT, save_checkpoint, write_history
from training.config import Config
from training.data import load_dataset
from training.export import export
from training.held_out import CACHE, HeldOut, main, predict_held_out, predictions_csv, print_collections
from training.report import read_rows


def finish(run_dir: Path, config: Config) -> Path:
    """A run that came to its end, as far as its files tell: a checkpoint of untrained weights, and a history."""
    model = build(
        config.model,
        classes=("benign", "malignant"),
        seed=config.data.held_out_fold + 7,
        images=torch.zeros(2, 3, 32, 32),
    )
    ema = AveragedModel(model)
    history = [{"epoch": e + 1, "size": 32, "train_loss": 0.7, "seconds": 1.0} for e in range(config.epochs)]
    run_dir.mkdir()
    optimizer = torch.optim.AdamW(model.parameters())
    fingerprints = load_dataset(config.data, seed=config.seed, progress=False).fingerprints
    save_checkpoint(run_dir / CHECKPOINT, config, model, ema, optimizer, history, fingerprints)
    write_history(run_dir, history)
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for fold in (0, 1, -1):
        finish(root / f"fold{fold}", short().with_fold(fold))
    return root


def test_each_image_is_predicted_by_the_network_that_did_not_see_it(runs: Path) -> None:
    held_out = predict_held_out([runs / "fold0", runs / "fold1"], progress=False)
    assert len(set(held_out.names)) == len(held_out.names) == 40
    assert set(held_out.folds) == {0, 1}
    one = predict_held_out([runs / "fold1"], progress=False)
    assert np.array_equal(one.logits, held_out.logits[held_out.folds == 1])
    stale = (runs / "fold1" / CACHE).read_text()
    (runs / "fold1" / CACHE).unlink()
    predict_held_out([runs / "fold1"], progress=False)
    assert (runs / "fold1" / CACHE).read_text() == stale


def test_another_size_is_predicted_and_kept_by_itself(runs: Path) -> None:
    served = predict_held_out([runs / "fold0"], progress=False)
    smaller = predict_held_out([runs / "fold0"], size=64, progress=False)
    assert smaller.names == served.names
    assert not np.allclose(smaller.logits, served.logits, atol=1e-6)
    assert np.array_equal(predict_held_out([runs / "fold0"], progress=False).logits, served.logits)


def test_runs_that_are_no_folds_of_one_recipe_are_refused(runs: Path) -> None:
    for wrong in ([runs / "fold0", runs / "fold0"], [runs / "fold0", runs / "fold-1"]):
        with pytest.raises(ValueError, match="not different folds of one recipe"):
            predict_held_out(wrong, progress=False)


def test_a_version_of_all_images_carries_the_figures_of_its_folds(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held nothing out: give the runs of its folds"):
        export(runs / "fold-1", tmp_path, name=NAME, version="1")
    other = finish(tmp_path / "other", short(weight_decay=0.5).with_fold(0))
    with pytest.raises(ValueError, match="its recipe differs"):
        export(runs / "fold-1", tmp_path, name=NAME, version="1", folds=[other])
    folds = [runs / "fold0", runs / "fold1"]
    folder = export(runs / "fold-1", tmp_path, name=NAME, version="1", folds=folds)
    manifest = store.verify(tmp_path, NAME, "1")
    assert manifest.split.held_out_fold == -1
    assert (manifest.split.training_images, manifest.split.held_out_images) == (80, 40)
    assert manifest.calibrated_on == "40 images of drawn, held out in 2 of 4 folds"
    held_out = predict_held_out(folds, progress=False)
    judged = cross_fitted(held_out.labels, held_out.logits, folds=held_out.folds)
    assert manifest.metrics["accuracy"].value == pytest.approx(float((judged.decided == held_out.labels).mean()))
    assert "have seen all of the data" in (folder / "MODEL_CARD.md").read_text()
    assert len(read_rows(folder / "report" / "predictions.csv")) == 40
    assert (folder / "report" / "fold1.csv").is_file()


def test_the_command_writes_predictions_or_figures_of_a_setting(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--runs", str(runs / "fold0"), str(runs / "fold1"), "--evidence", str(tmp_path)]
    main(command)
    assert "40 images of drawn, held out" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "predictions.csv")) == 40
    main([*command, "--setting", "two folds"])
    rows = read_rows(tmp_path / "external.csv")
    assert {(row["setting"], row["data"], row["images"]) for row in rows} == {("two folds", "drawn", "40")}
    with pytest.raises(SystemExit, match="not different folds of one recipe"):
        main(["--runs", str(runs / "fold-1")])


def test_the_command_tells_collections_of_isic_2019_apart(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"ISIC_{24_306 + i:07}.jpg" for i in range(20)] + ["ISIC_0053453.jpg", "1.jpg"]
    labels = np.array([0, 1] * 11)
    logits = np.stack([np.zeros(22), np.where(labels == 1, 1.0, -1.0)], axis=1).astype(np.float32)
    images = HeldOut(names, labels, np.zeros(22, dtype=np.int64), labels == 9, logits)
    print_collections(images, cross_fitted(labels, logits))
    assert capsys.readouterr().out == "roc_auc, HAM10000  1.0000  95% 1.0000 to 1.0000, 20 images\n"


def test_predictions_keep_every_image_and_who_is_referred() -> None:
    labels = np.array([0, 1] * 10)
    logits = np.stack([np.zeros(20), np.linspace(-4, 4, 20)], axis=1).astype(np.float32)
    images = HeldOut([f"{i}.png" for i in range(20)], labels, np.zeros(20, dtype=np.int64), labels == 9, logits)
    judged = cross_fitted(labels, logits)
    rows = list(csv.DictReader(io.StringIO(predictions_csv([(images, judged, "skin")], ("a", "b")).decode())))
    assert [row["name"] for row in rows] == images.names
    assert [int(row["refer_0.95"]) for row in rows] == judged.referred["0.95"].astype(int).tolist()
    assert float(rows[3]["probability_b"]) == pytest.approx(float(judged.probabilities[3, 1]), abs=1e-6)
