"""Robustness: the figures are scikit-learn's, paired over networks, and an interrupted run goes on."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import ROOT
from training import robustness
from training.config import Config, load_config
from training.corruptions import KINDS
from training.plots import png
from training.robustness import (
    ALL,
    CLEAN,
    load_networks,
    main,
    measure,
    robustness_figure,
)

CONFIG = load_config(ROOT / "training" / "configs" / "smoke.toml")


class Darkness(nn.Module):
    """Calls the darker middle malignant; counts the images that it has seen."""

    def __init__(self, scale: float = 1.0, *, deaf_to: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale, deaf_to]))
        self.seen = 0

    def forward(self, images: Tensor) -> SimpleNamespace:
        self.seen += len(images)
        side = images.shape[-1] // 4
        middle = images[:, :, side:-side, side:-side].amin(dim=1).flatten(1)
        score = self.scale[0] * (100 - middle.quantile(0.2, dim=1)) / 20
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(score), score], dim=1))


def changed(**fields: object) -> Config:
    return CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update=fields)})


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Config, nn.Module]]:
    """Runs by folder, in place of checkpoints."""
    runs: dict[str, tuple[Config, nn.Module]] = {
        "runs/a": (CONFIG, Darkness(1.0)),
        "runs/b": (CONFIG, Darkness(-0.5)),
    }
    monkeypatch.setattr(robustness, "from_run", lambda folder: runs[str(folder)])
    return runs


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_threshold_comes_from_images_that_are_not_measured() -> None:
    """All measured images have low scores: a threshold fitted on them would be right, that of the others is not."""
    labels = np.tile([0, 1], 20)
    measured = np.arange(20)
    clean = np.where(labels == 1, 2.0, 1.0)
    clean[measured] -= 10
    answers = {("a", CLEAN): clean[None]} | {("a", kind): np.tile(clean[measured], (5, 1)) for kind in KINDS}
    rows, _ = measure(answers, labels, measured)
    found = {row.metric: row for row in rows if row.kind == "blur" and row.strength == 3}
    assert found["accuracy"].value == 0.5
    assert found["roc_auc"].value == 1.0
    assert found["accuracy"].images == 20
    clean[measured] += 10
    rows, _ = measure(answers | {("a", CLEAN): clean[None]}, labels, measured)
    assert {row.value for row in rows if row.kind == CLEAN} == {1.0}


def test_a_difference_is_paired() -> None:
    """Two networks that answer alike differ by nothing on every resample, however wide the interval of each."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 80)
    measured = np.arange(40)
    clean = rng.normal(labels, 1.0)
    answers = {}
    for name in ("a", "b"):
        answers[name, CLEAN] = clean[None]
        answers |= {(name, kind): np.tile(clean[measured], (5, 1)) for kind in KINDS}
    answers["b", "blur"] = answers["b", "blur"] + np.arange(5)[:, None] * rng.normal(0, 3, 40)
    rows, summary = measure(answers, labels, measured)
    own = [row for row in rows if row.network == "a" and row.metric == "roc_auc"]
    assert all(row.high - row.low > 0.1 for row in own)
    pairs = {(r.kind, r.strength): r for r in rows if r.network == "b - a" and r.metric == "roc_auc"}
    assert len(pairs) == 1 + 5 * len(KINDS)
    assert (pairs["jpeg", 4].low, pairs["jpeg", 4].high) == (0, 0)
    blurred = {r.network: r for r in rows if (r.kind, r.strength, r.metric) == ("blur", 5, "roc_auc")}
    assert pairs["blur", 5].value == pytest.approx(blurred["b"].value - blurred["a"].value)
    assert pairs["blur", 5].low < pairs["blur", 5].value < pairs["blur", 5].high
    means = {(s.network, s.kind): s.value for s in summary if s.metric == "roc_auc"}
    assert means["b - a", "blur"] == pytest.approx(np.mean([pairs["blur", s].value for s in range(1, 6)]))
    assert means["b", ALL] == pytest.approx(np.mean([means["b", kind] for kind in KINDS]))


def test_a_run_measures_every_kind_and_strength_and_goes_on_where_it_stopped(
    tmp_path: Path,
    networks: dict[str, tuple[Config, nn.Module]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = ("jpeg", "hair")  # two are enough to tell, and quick
    monkeypatch.setattr(robustness, "KINDS", kinds)
    command = ["--run", "a=runs/a", "--run", "b=runs/b", "--images", "10", "--evidence", str(tmp_path)]
    main(command)
    rows = read(tmp_path / "robustness.csv")
    assert {row["kind"] for row in rows} == {CLEAN, *kinds}
    assert list(rows[0]) == ["network", "kind", "strength", "metric", "value", "low", "high", "images"]
    assert len(rows) == 3 * 2 * (1 + 5 * len(kinds))
    found = {(r["network"], r["kind"], r["strength"], r["metric"]): float(r["value"]) for r in rows}
    assert found["a", CLEAN, "0", "roc_auc"] > 0.9
    assert found["b", CLEAN, "0", "roc_auc"] < 0.1  # its sign is turned round
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in rows)
    printed = capsys.readouterr().out
    assert "b - a" in printed
    assert "10 held-out images, threshold fitted on the 10 others" in printed

    seen = [network.seen for _, network in networks.values() if isinstance(network, Darkness)]
    assert seen == [20 + 10 * 5 * len(kinds)] * 2
    gone = next((tmp_path / "robustness").glob("b-hair-*.csv"))
    gone.unlink()
    networks["runs/a"] = (CONFIG, Darkness(2.0))  # trained further: nothing kept of it holds any more
    main(command)
    assert read(tmp_path / "robustness.csv")[0].keys() == rows[0].keys()
    again = [network.seen for _, network in networks.values() if isinstance(network, Darkness)]
    assert again == [20 + 10 * 5 * len(kinds), seen[1] + 10 * 5]
    assert gone.is_file()


def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, networks: dict[str, tuple[Config, nn.Module]]
) -> None:
    networks["runs/other-fold"] = (changed(held_out_fold=1), Darkness())
    networks["runs/everything"] = (changed(held_out_fold=-1), Darkness())
    networks["runs/three"] = (changed(classes=["a", "b", "c"]), Darkness())
    networks["runs/more"] = (changed(extra="isic2019"), Darkness())

    def refused(*runs: str) -> str:
        with pytest.raises(SystemExit) as error:
            main([part for run in runs for part in ("--run", run)] + ["--evidence", str(tmp_path)])
        return str(error.value)

    assert "runs/other-fold differ in [data] or seed" in refused("a=runs/a", "b=runs/other-fold")
    assert "runs/everything holds no images" in refused("a=runs/everything")
    assert "runs/three holds no images of two classes" in refused("a=runs/three")
    assert "two runs have one name" in refused("a=runs/a", "a=runs/b")
    assert "write NAME=FOLDER" in refused("runs/a")
    assert "write NAME=FOLDER" in refused("a/b=runs/a")
    assert "--images 240 of 20 held-out images" in refused("a=runs/a")
    config, found = load_networks(["a=runs/a", "b=runs/more"])  # `extra` leaves the held-out images as they are
    assert [network.size for network in found] == [config.phases[-1].size] * 2


def test_a_folder_without_a_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"training\.robustness: no .*checkpoint"):
        main(["--run", f"a={tmp_path}", "--evidence", str(tmp_path)])


def test_the_figure_has_a_panel_a_kind_and_metric_and_a_line_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []

    def kept(figure: Any) -> bytes:
        figures.append(figure)
        return png(figure)

    monkeypatch.setattr(robustness, "png", kept)
    rows = [
        {
            "network": network,
            "kind": kind,
            "strength": str(strength),
            "metric": metric,
            "value": str(0.9 - 0.1 * strength),
            "low": "0.3",
            "high": "0.95",
            "images": "240",
        }
        for network in ("a", "b", "b - a")
        for metric in ("accuracy", "roc_auc")
        for kind in (CLEAN, *KINDS)
        for strength in ((0,) if kind == CLEAN else (5, 4, 3, 2, 1))
    ]
    assert robustness_figure(rows).startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == 2 * len(KINDS)
    assert [axes.get_title() for axes in figure.axes[: len(KINDS)]] == list(KINDS)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        assert list(axes.lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
        assert axes.lines[0].get_ydata() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
