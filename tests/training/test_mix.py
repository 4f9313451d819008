from pathlib import Path

import numpy as np
import pytest
import torch

from app.model import store
from tests.conftest import NAME, make_manifest
from tests.training.test_held_out import finish
from tests.training.test_train import SMOKE, short
from training.backbones import from_run
from training.checkpoint import read_run
from training.config import Config, load_config
from training.mix import main, mixed


@pytest.fixture
def start(tmp_path: Path, random_weights: bytes) -> Path:
    manifest = make_manifest(training_config=load_config(SMOKE).model_dump(mode="json"))
    return store.publish(tmp_path, manifest, {store.WEIGHTS: random_weights})


@pytest.fixture
def run(tmp_path: Path, start: Path) -> Path:
    fields = short().model_dump()
    return finish(
        tmp_path / "run", Config.model_validate(fields | {"model": fields["model"] | {"start": f"version:{start}"}})
    )


def test_a_mixture_is_a_finished_run_between_its_ends(tmp_path: Path, run: Path) -> None:
    main(["--run", str(run), "--shares", "0.25", "--out", str(tmp_path / "mixed")])
    config, model = from_run(tmp_path / "mixed")
    assert config.model.start_share == 0.25
    past = store.load(tmp_path, NAME, "1").weights["head.fc1.weight"].astype(np.float32)
    own = read_run(run).weights["head.fc1.weight"].astype(np.float32)
    assert np.allclose(model.head.fc1.weight.detach().numpy(), 0.25 * past + 0.75 * own, atol=2e-3)
    assert read_run(tmp_path / "mixed").history == read_run(run).history


def test_the_ends_of_a_mixture_are_the_run_and_its_start(tmp_path: Path, run: Path) -> None:
    whole, past = read_run(run), store.load(tmp_path, NAME, "1").weights
    for share, weights in ((0.0, whole.weights), (1.0, past)):
        found = mixed(whole, past, share)
        assert all(torch.equal(found[k], torch.from_numpy(v.astype(np.float32))) for k, v in weights.items())
    with pytest.raises(ValueError, match="not of one architecture"):
        mixed(whole, {k: v for k, v in past.items() if "fusion" not in k}, 0.5)


def test_each_share_is_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--run", str(run), "--shares", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["share 0", "share 1"]
    assert all("held_out_roc_auc" in line for line in lines)


def test_what_cannot_be_mixed_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(SystemExit, match="--out takes exactly one"):
        main(["--run", str(run), "--shares", "0", "1", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="did not start from a published version"):
        main(["--run", str(finish(tmp_path / "other", short())), "--shares", "0"])


def test_two_runs_that_held_out_the_same_images_mix(tmp_path: Path, run: Path) -> None:
    other = finish(tmp_path / "other", short())
    main(["--run", str(run), "--with", str(other), "--shares", "0.5", "--out", str(tmp_path / "soup")])
    config, model = from_run(tmp_path / "soup")
    assert (config.model.start_share, config.model.mixed_with) == (0.5, read_run(other).config.run_name)
    ends = [read_run(folder).weights["head.fc1.weight"].astype(np.float32) for folder in (run, other)]
    assert np.allclose(model.head.fc1.weight.detach().numpy(), (ends[0] + ends[1]) / 2, atol=2e-3)


def test_a_run_that_may_have_seen_the_held_out_images_is_refused(tmp_path: Path, run: Path) -> None:
    other = finish(tmp_path / "other", short().with_fold(1))
    with pytest.raises(SystemExit, match="may have been trained on what the run holds out"):
        main(["--run", str(run), "--with", str(other), "--shares", "0.5"])


def test_a_run_in_other_folds_is_refused(tmp_path: Path, run: Path) -> None:
    config = short()
    other = finish(tmp_path / "other", config.model_copy(update={"seed": config.seed + 1}))
    with pytest.raises(SystemExit, match="their images, folds or seeds differ"):
        main(["--run", str(run), "--with", str(other), "--shares", "0.5"])
