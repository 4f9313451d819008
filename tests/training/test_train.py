"""Training from a config to weights: exact resume, equal gradients over processes, and the smoke run."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from tests.conftest import ROOT
from training.augment import augment
from training.backbones import build
from training.checkpoint import CHECKPOINT
from training.config import Config, load_config
from training.data import Dataset, load_dataset
from training.distributed import World
from training.drawn import draw_lesion
from training.train import (
    epoch_order,
    moving_average,
    parameter_groups,
    schedule,
    set_trainable,
    stopped_early,
    train,
    train_epoch,
)

SMOKE = ROOT / "training" / "configs" / "smoke.toml"
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def short(**optimisation: object) -> Config:
    """The smoke config at its smallest: two epochs of 32 pixels in two phases."""
    config = load_config(SMOKE)
    phases = [phase.model_copy(update={"epochs": 1, "size": 32}) for phase in config.phases]
    changes = {"phases": phases, "optimisation": config.optimisation.model_copy(update=optimisation)}
    return config.model_copy(update=changes)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    config = short()
    train(config, tmp_path / "whole", ALONE)
    train(config, tmp_path / "parts", ALONE, until_epoch=1)
    assert len((tmp_path / "parts" / "metrics.csv").read_text().splitlines()) == 2
    train(config, tmp_path / "parts", ALONE)
    whole, parts = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len((tmp_path / "parts" / "metrics.csv").read_text().splitlines()) == 3
    assert list((tmp_path / "parts" / "tensorboard").iterdir())


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    train(short(), tmp_path, ALONE, until_epoch=1)
    with pytest.raises(ValueError, match="another config: give another --run-dir"):
        train(short(weight_decay=0.5), tmp_path, ALONE)


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(24):
        folder = tmp_path / "clinic" / ("benign", "malignant")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        draw_lesion(number % 2, number, size=(64, 64)).save(folder / f"{number}.png")
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    config = short()
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": "clinic"})})
    train(config, tmp_path / "run", ALONE, until_epoch=1)
    draw_lesion(1, 99, size=(64, 64)).save(tmp_path / "clinic" / "malignant" / "99.png")
    with pytest.raises(ValueError, match="has seen other images than are here now"):
        train(config, tmp_path / "run", ALONE)


def test_a_class_that_cannot_be_calibrated_is_named_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(24):
        folder = tmp_path / "clinic" / ("malignant" if number < 4 else "benign")
        folder.mkdir(parents=True, exist_ok=True)
        draw_lesion(int(number < 4), number, size=(64, 64)).save(folder / f"{number}.png")
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    config = short()
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": "clinic"})})
    with pytest.raises(ValueError, match="a calibration needs 2"):
        train(config, tmp_path / "run", ALONE)
    assert not (tmp_path / "run" / CHECKPOINT).exists()


@pytest.mark.parametrize(("steps", "share"), [(14, 0.15), (200, 0.01)])
def test_the_average_of_a_short_run_is_not_one_of_its_beginning(steps: int, share: float) -> None:
    """The first weights are 1 and all others 0, so that their average is the share of the first."""
    weight = torch.nn.Linear(1, 1, bias=False)
    ema = AveragedModel(weight, multi_avg_fn=moving_average(0.98))
    with torch.no_grad():
        for step in range(steps):
            weight.weight.fill_(float(step == 0))
            ema.update_parameters(weight)
    assert 0 <= next(ema.parameters()).item() < share
    for _ in range(500):  # by now each step counts 0.02
        ema.update_parameters(weight)
    with torch.no_grad():
        weight.weight.fill_(1)
    ema.update_parameters(weight)
    assert next(ema.parameters()).item() == pytest.approx(0.02, abs=1e-4)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower optimisation\.batch_size"):
        train(short(batch_size=1000), tmp_path, ALONE)


WORKER = """
import sys, torch
from safetensors.torch import save_file
from tests.training.test_train import UNEVEN, one_epoch
from training.distributed import same_everywhere, world
torch.set_num_threads(1)
with world() as processes:
    assert same_everywhere([3, 7], processes)
    assert not same_everywhere([3, processes.rank], processes)
    steps = one_epoch(processes, images=UNEVEN)
    if processes.main:
        save_file(steps, sys.argv[1])
"""
UNEVEN = 8  # in batches of 7 over 2 processes: 4 and 3, then a last batch of one image, for one process alone


def one_epoch(world: World, *, images: int) -> dict[str, torch.Tensor]:
    """How far an epoch in batches of 7 moves each weight, with plain SGD without decay."""
    config = short(batch_size=7)
    dataset = load_dataset(config.data, seed=config.seed, progress=False)
    training = dataset.split(0).training[:images]
    # In float64: rounding differs with the size of a batch, and 50 untrained layers make 0.2% of it in float32
    model = build(config.model, classes=("benign", "malignant"), seed=1, images=dataset.images[training[:7]]).double()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, config.optimisation), lr=1.0)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.01
    ema = AveragedModel(model)
    train_epoch(config, 0, dataset, training, model=model, ema=ema, optimizer=optimizer, world=world)
    return {k: (before[k] - v).detach().contiguous() for k, v in model.named_parameters()}


def test_two_nodes_take_the_steps_that_one_process_takes(tmp_path: Path) -> None:
    """Two launchers that find each other, as on two hosts (docs/training.md), with a process each."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
    saved = tmp_path / "two.safetensors"
    nodes = [
        subprocess.Popen(
            [*command, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", tmp_path / "worker.py", saved],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for port in [free_port()] * 2
    ]
    try:
        for node in nodes:
            _, errors = node.communicate(timeout=200)
            assert node.returncode == 0, errors[-3000:]
    finally:
        for node in nodes:
            node.kill()
    two, one = load_file(saved), one_epoch(ALONE, images=UNEVEN)
    assert two.keys() == one.keys()
    total = sum(float(v.square().sum()) for v in one.values()) ** 0.5
    apart = sum(float((two[k] - one[k]).square().sum()) for k in one) ** 0.5
    assert total > 0
    assert apart < 1e-4 * total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_epoch_takes_every_image_once_the_last_short_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[torch.Tensor] = []

    def watched(images: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        batches.append(images)
        return augment(images, *rest, **named)

    monkeypatch.setattr("training.train.augment", watched)
    one_epoch(ALONE, images=17)
    assert [len(batch) for batch in batches] == [7, 7, 3]
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 17


@pytest.mark.parametrize(
    ("shares", "counts"), [((1, 0.3), (180, 60)), ((0, 1), (0, 200)), ((0.5, 0.1), (90, 20)), ((1, 1), (180, 200))]
)
def test_an_epoch_draws_shares_of_two_folders_and_spreads_them_evenly(
    shares: tuple[float, float], counts: tuple[int, int]
) -> None:
    nothing = torch.zeros(400, 3, 1, 1, dtype=torch.uint8)
    extra = np.arange(400) >= 200
    labels, folds = torch.zeros(400, dtype=torch.int64), np.zeros(400, dtype=np.int64)
    dataset = Dataset(nothing, labels, [""] * 400, folds, extra, fingerprint="", root_fingerprint="")
    training = np.arange(20, 400)  # 180 of the first folder, 200 of the second
    epochs = [epoch_order(dataset, training, shares, torch.Generator().manual_seed(seed)).numpy() for seed in range(20)]
    for order in epochs:
        assert (int((~extra[order]).sum()), int(extra[order].sum())) == counts
        assert len(set(order)) == len(order)
        assert set(order) <= set(training)
    for share, folder in zip(shares, (~extra, extra), strict=True):
        drawn = {tuple(sorted(order[folder[order]])) for order in epochs}
        assert len(drawn) == (20 if 0 < share < 1 else 1)  # drawn anew
    quarters = np.array_split(np.stack(epochs), 4, axis=1)
    share = counts[1] / sum(counts)
    error = math.sqrt(share * (1 - share) / quarters[-1].size)
    assert np.allclose([extra[part].mean() for part in quarters], share, atol=4 * error)


def test_the_schedule_warms_up_in_each_phase_and_ends_at_nought() -> None:
    assert schedule(0.0, step_in_phase=0, warmup_steps=9) == pytest.approx(0.1)
    assert schedule(0.0, step_in_phase=9, warmup_steps=9) == pytest.approx(1.0)
    assert schedule(0.5, step_in_phase=100, warmup_steps=9) == pytest.approx(0.5)
    assert schedule(1.0, step_in_phase=100, warmup_steps=9) == pytest.approx(0.0)


def test_learning_rates_fall_with_depth_and_vectors_do_not_decay() -> None:
    config = load_config(ROOT / "training" / "configs" / "full.toml")
    dataset_images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    model = build(
        config.model.model_copy(update={"start": "random"}),
        classes=("benign", "malignant"),
        seed=1,
        images=dataset_images,
    )
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config.optimisation)
        for p in group["params"]
    }
    names = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(names)
    assert names["head.fc1.weight"] == (1e-3, 0.05)
    assert names["fusion.project.bias"] == (1e-3, 0.0)
    assert names["trunk.layer4.0.conv1.weight"] == pytest.approx((3e-4, 0.05))
    assert names["trunk.layer2.0.conv1.weight"] == pytest.approx((3e-4 * 0.7**2, 0.05))
    assert names["trunk.bn1.weight"] == pytest.approx((3e-4 * 0.7**4, 0.0))
    phase = config.phases[1]
    set_trainable(model, phase, batch_norm="frozen")
    assert {n.split(".")[1] for n, p in model.trunk.named_parameters(prefix="t") if not p.requires_grad} == {
        "conv1",
        "bn1",
        "layer1",
    }
    assert not any(m.training for m in model.modules())


def test_early_stop_waits_for_its_patience() -> None:
    def rows(*losses: float) -> list[dict[str, float]]:
        return [{"held_out_log_loss": loss} for loss in losses]

    assert not stopped_early([], 2)
    assert not stopped_early(rows(3, 2, 2.5), 2)
    assert stopped_early(rows(3, 2, 2.5, 2.1), 2)
    assert not stopped_early(rows(3, 2, 2.5, 1.9), 2)


def test_the_smoke_run_goes_from_training_to_an_http_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole product on drawn images: train, publish, serve, and agree with evaluate."""
    from fastapi.testclient import TestClient

    from app.main import create_app
    from app.model.labels import calibrate
    from app.settings import Settings
    from training.drawn import draw_dataset
    from training.evaluate import main as evaluate
    from training.export import main as export
    from training.report import read_rows
    from training.train import main as train_main

    train_main(["--config", str(SMOKE), "--run-dir", str(tmp_path / "run")])
    export(["--run", str(tmp_path / "run"), "--store", str(tmp_path / "store"), "--promote"])
    evaluate(["--store", str(tmp_path / "store")])
    version = tmp_path / "store" / "asff-resnet50" / "1"
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["metrics"]["roc_auc"]["value"] > 0.9
    assert set(manifest["operating_points"]) == {"balanced", "sensitivity-95", "specificity-95"}
    card = (version / "MODEL_CARD.md").read_text()
    assert f"| roc_auc | {manifest['metrics']['roc_auc']['value']:.4f} |" in card
    assert f"roc_auc            {manifest['metrics']['roc_auc']['value']:.4f}" in capsys.readouterr().out
    for picture in ("roc", "confusion", "reliability", "decision_curve", "history"):
        assert (version / "report" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="published versions never change"):
        export(["--run", str(tmp_path / "run"), "--store", str(tmp_path / "store"), "--version", "1"])

    files = {name: data for name, _, data in draw_dataset(["benign", "malignant"])}
    rows = read_rows(version / "report" / "predictions.csv")
    assert len(rows) == manifest["split"]["held_out_images"] == 20
    with TestClient(create_app(Settings(model_store=tmp_path / "store", engine="torch"))) as client:
        for row in rows:
            answer = client.post("/predict", content=files[row["name"]], headers={"content-type": "image/png"}).json()
            logits = np.array([float(row["logit_benign"]), float(row["logit_malignant"])], dtype=np.float32)
            expected = calibrate(logits, manifest["temperature"])[1]
            assert answer["probabilities"]["malignant"] == pytest.approx(expected, abs=1e-3)
            assert answer["model"]["version"] == "1"


def test_a_run_that_holds_nothing_out_trains_on_everything(tmp_path: Path) -> None:
    config = short(precision="bfloat16")
    everything = config.model_copy(update={"data": config.data.model_copy(update={"held_out_fold": -1})})
    train(everything, tmp_path, ALONE, until_epoch=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "epoch,size,train_loss,seconds"


def test_export_refuses_an_unfinished_run(tmp_path: Path) -> None:
    from training.export import main as export

    train(short(), tmp_path / "run", ALONE, until_epoch=1)
    with pytest.raises(SystemExit, match="has 1 of 2 epochs"):
        export(["--run", str(tmp_path / "run"), "--store", str(tmp_path)])


def test_export_says_what_to_do_without_a_run(tmp_path: Path) -> None:
    from training.export import main as export

    with pytest.raises(SystemExit, match="train first"):
        export(["--run", str(tmp_path), "--store", str(tmp_path)])
