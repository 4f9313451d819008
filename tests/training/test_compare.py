"""The comparison from training to its tables, on drawn images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import training.evaluate
import training.train
from tests.conftest import ROOT, random_model
from training.checkpoint import CHECKPOINT
from training.compare import (
    NETWORKS,
    Predictions,
    gate_rows,
    main,
    predict_with_gate,
    read_predictions,
    read_rows,
    variant,
    write_predictions,
)
from training.config import load_config

COMPARE = ROOT / "training" / "configs" / "compare.toml"
SMOKE = (ROOT / "training" / "configs" / "smoke.toml").read_text()


def small_config(folder: Path) -> Path:
    """One epoch of 64 pixels, the least that AlexNet takes."""
    text = SMOKE[: SMOKE.index("[[phases]]")] + '[[phases]]\nepochs = 1\nsize = 64\nfrozen = ["conv1"]\n'
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_the_variants_differ_in_the_model_alone() -> None:
    config = load_config(COMPARE)
    variants = {name: variant(config, name) for name in NETWORKS}
    assert len({one.name for one in variants.values()}) == len({one.model for one in variants.values()}) == 7
    for one in variants.values():
        assert one.data == config.data
        assert (one.optimisation, one.augmentation, one.seed) == (config.optimisation, config.augmentation, config.seed)
        assert [(p.epochs, p.size) for p in one.phases] == [(1, 128), (4, 128), (1, 160)]
        from_scratch = one.model.start == "random"
        assert all(bool(p.frozen) != from_scratch for p in one.phases)
    assert variants["resnet50"].model.start == variants["asff-branch"].model.start == config.model.start


def test_a_comparison_goes_from_training_to_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.train, "RESTORE_IMAGES", 4)
    monkeypatch.setattr(training.evaluate, "RESAMPLES", 20)
    command = ["--config", str(small_config(tmp_path)), "--evidence", str(tmp_path / "evidence")]
    command += ["--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match="no predictions in"):
        main([*command, "--table-only"])

    main([*command, "--only", "asff-branch", "alexnet"])
    folder = tmp_path / "evidence" / "comparison"
    found = read_predictions(folder / "asff-branch.csv")
    assert len(found.names) == 20
    assert {name.split("/")[0] for name in found.names} == {"benign", "malignant"}
    assert found.labels.sum() == 10
    assert read_predictions(folder / "alexnet.csv").names == found.names

    # Again: the finished run is not trained further, and says the same
    checkpoint = tmp_path / "runs" / "smoke-alexnet" / CHECKPOINT
    written, before = checkpoint.stat().st_mtime_ns, (folder / "alexnet.csv").read_bytes()
    main([*command, "--only", "alexnet"])
    assert (checkpoint.stat().st_mtime_ns, (folder / "alexnet.csv").read_bytes()) == (written, before)

    capsys.readouterr()
    main([*command, "--table-only"])
    assert "still without asff-channel, resnet50, densenet169" in capsys.readouterr().out
    rows = {row["network"]: row for row in read_rows(folder / "table.csv")}
    assert list(rows) == ["asff-branch", "alexnet"]
    right = found.positive == (found.labels == 1)
    assert float(rows["asff-branch"]["accuracy"]) == pytest.approx(right.mean())
    assert not (folder / "paired.csv").exists()
    gates = read_rows(folder / "gates.csv")
    assert {row["network"] for row in gates} == {"asff-branch"}
    assert 0 < float(gates[0]["a"]) < 1


def stored(folder: Path, name: str, *, seed: int, shift: float, images: int = 60) -> Predictions:
    """Predictions of a network that never was, the better the larger `shift`."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 2
    logits = shift * (labels - 0.5) + rng.normal(size=images)
    probabilities = expit(logits / rng.choice([0.5, 1.0, 2.0], size=images))  # as from temperatures of several pieces
    found = Predictions([f"{n}.png" for n in range(images)], labels, logits, probabilities, logits > 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / f"{name}.csv", found)
    return found


def test_the_tables_come_from_the_predictions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.evaluate, "RESAMPLES", 50)
    folder = tmp_path / "comparison"
    asff = stored(folder, "asff-branch", seed=1, shift=4)
    plain = stored(folder, "resnet50", seed=2, shift=1)
    main(["--config", str(COMPARE), "--evidence", str(tmp_path), "--table-only"])
    first, second = read_rows(folder / "table.csv")
    assert (first["network"], second["network"]) == ("asff-branch", "resnet50")
    assert int(first["parameters"]) == sum(p.numel() for p in random_model("branch_softmax").parameters())
    assert int(second["parameters"]) == sum(p.numel() for p in random_model(None).parameters())
    columns = ("accuracy", "precision", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc")
    assert list(first)[2:] == [f"{name}{end}" for name in columns for end in ("", "_low", "_high")]
    for row in (first, second):
        for name in columns:
            assert 0 < float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"]) <= 1
    (pair,) = read_rows(folder / "paired.csv")
    right, plain_right = asff.positive == (asff.labels == 1), plain.positive == (plain.labels == 1)
    assert int(pair["only_network_right"]) == (right & ~plain_right).sum()
    assert int(pair["only_baseline_right"]) == (plain_right & ~right).sum()
    # Several temperatures reorder the probabilities, so that ranking is measured on the logits
    assert float(second["roc_auc"]) == pytest.approx(roc_auc_score(plain.labels, plain.logits), abs=1e-6)
    assert float(second["roc_auc"]) != pytest.approx(roc_auc_score(plain.labels, plain.probabilities), abs=1e-6)
    difference = float(first["roc_auc"]) - float(second["roc_auc"])
    assert float(pair["auc_difference"]) == pytest.approx(difference, abs=2e-6)
    assert 0 < float(pair["auc_low"]) < difference < float(pair["auc_high"])
    assert float(pair["mcnemar_p"]) < 0.05
    assert float(pair["delong_p"]) < 0.05


def test_predictions_survive_their_file(tmp_path: Path) -> None:
    found = stored(tmp_path, "any", seed=3, shift=1)
    again = read_predictions(tmp_path / "any.csv")
    assert again.names == found.names
    assert (again.labels == found.labels).all()
    assert (again.positive == found.positive).all()
    assert np.allclose(again.logits, found.logits, rtol=1e-8)
    assert (np.argsort(again.probabilities) == np.argsort(found.probabilities)).all()


def test_predictions_of_other_images_are_not_compared(tmp_path: Path) -> None:
    stored(tmp_path / "comparison", "asff-branch", seed=1, shift=1)
    stored(tmp_path / "comparison", "resnet50", seed=1, shift=1, images=58)
    with pytest.raises(SystemExit, match=r"resnet50\.csv is of other images"):
        main(["--config", str(COMPARE), "--evidence", str(tmp_path), "--table-only"])


def test_a_run_that_holds_nothing_out_cannot_be_compared(tmp_path: Path) -> None:
    path = small_config(tmp_path)
    path.write_text(path.read_text().replace("held_out_fold = 0", "held_out_fold = -1"))
    with pytest.raises(SystemExit, match="needs a held-out fold"):
        main(["--config", str(path), "--runs", str(tmp_path), "--evidence", str(tmp_path), "--only", "alexnet"])


def test_the_recorded_shares_are_those_that_fuse() -> None:
    model = random_model("branch_softmax")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    assert model.fusion is not None
    logits, shares = predict_with_gate(model, images, fusion=model.fusion, size=64, device=torch.device("cpu"))
    with torch.inference_mode():
        conv4, conv5 = model.trunk((images.float() - model.mean) / model.std)
        f2 = torch.nn.functional.interpolate(model.fusion.project(conv5), size=(4, 4), mode="bilinear")
        a = torch.from_numpy(shares)[:, :, None, None]
        assert torch.allclose(model.head(a * conv4 + (1 - a) * f2).logits, torch.from_numpy(logits), atol=1e-4)
        assert torch.allclose(model(images).logits, torch.from_numpy(logits), atol=1e-4)
    assert not model.fusion._forward_pre_hooks


def test_gate_rows_describe_the_distribution() -> None:
    shares = np.array([[0.1, 0.9], [0.3, 0.7]], dtype=np.float32)  # [images, channels]
    rows = gate_rows("asff-branch", shares)
    facts = {row["quantity"]: float(row["a"]) for row in rows[:3]}
    assert facts == pytest.approx({"mean": 0.5, "sd_between_images": 0.1, "sd_between_channels": 0.3}, rel=1e-4)
    quantiles = {row["at"]: float(row["a"]) for row in rows[3:]}
    assert len(quantiles) == 101
    assert (quantiles[0.0], quantiles[0.5], quantiles[1.0]) == pytest.approx((0.1, 0.5, 0.9))
