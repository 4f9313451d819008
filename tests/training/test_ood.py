from pathlib import Path

import numpy as np
import pytest

from app.engines.openvino_engine import OpenVinoEngine
from app.model import store
from app.model.out_of_distribution import FILE, score_of
from tests.conftest import NAME, make_manifest
from training import foreign, ood
from training.config import load_config
from training.data import load_dataset
from training.foreign import foreign_images
from training.ood import auroc, cross_fitted_share, fit, knn_scores

SMOKE = Path(__file__).parent.parent.parent / "training" / "configs" / "smoke.toml"


def cloud(images: int, *, seed: int) -> np.ndarray:
    """Features of which 3 of 20 directions vary much."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(images, 20)) * np.repeat([30, 1], [3, 17]) + 5, dtype=np.float32)


def test_a_step_across_the_cloud_is_farther_than_a_longer_one_along_it() -> None:
    familiar = fit(cloud(500, seed=0), axes=3)
    assert np.square(familiar.score(cloud(500, seed=1))).mean() == pytest.approx(1, rel=0.1)
    along, across = (np.full(20, 5, np.float32) for _ in range(2))
    along[0] += 60
    across[10] += 20
    assert familiar.score(along) < familiar.score(across)


def test_neighbours_tell_what_points_elsewhere() -> None:
    training = np.abs(cloud(100, seed=0))
    assert knn_scores(training, -training[:5]).min() > knn_scores(training, training[5:10]).max()


def test_the_share_that_is_flagged_is_of_images_that_did_not_set_the_threshold() -> None:
    scores = np.random.default_rng(0).normal(size=4000)
    assert cross_fitted_share(scores, []) == pytest.approx(ood.FLAGGED, abs=0.005)
    assert auroc(scores, scores + 10) == 1


def test_foreign_images_are_the_same_each_time_and_of_other_sources_in_each_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreign, "CROPS", 2)
    monkeypatch.setattr(foreign, "DRAWN", 2)
    parts = {part: list(foreign_images(part)) for part in ("choose", "evaluate")}
    again = list(foreign_images("choose"))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(parts["choose"], again, strict=True))
    assert {image.pixels.shape for images in parts.values() for image in images} == {(3, 224, 224)}
    ours, theirs = ({image.pixels.tobytes() for image in images} for images in parts.values())
    assert not ours & theirs
    sources = [{file for kind in pictures.values() for file in kind} for pictures in foreign.PICTURES.values()]
    assert not sources[0] & sources[1]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(foreign.PICTURES, "choose", {"photograph": (("no_such_package", "a.png"),)})
    with pytest.raises(ValueError, match="no_such_package"):
        list(foreign_images("choose"))


def test_a_version_is_published_again_and_knows_when_not_to_answer(
    tmp_path: Path, random_weights: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(SMOKE)
    dataset = load_dataset(config.data, seed=config.seed, progress=False)
    split = make_manifest().split.model_copy(update={"fingerprint": dataset.fingerprint})
    manifest = make_manifest(training_config=config.model_dump(mode="json"), split=split)
    root, out = tmp_path / "store", tmp_path / "evidence"
    store.publish(root, manifest, {store.WEIGHTS: random_weights, "report/a.txt": b"a"})
    monkeypatch.setattr(foreign, "CROPS", 1)
    monkeypatch.setattr(foreign, "DRAWN", 1)
    ood.main(["--version", str(root / NAME / "1"), "--out", str(out), "--publish"])
    assert "published" in capsys.readouterr().out
    loaded = store.load(root, NAME, "2")
    limits = loaded.manifest.out_of_distribution
    assert limits is not None
    assert {"all", "photograph", "noise", "fundus"} <= set(limits.auroc)
    assert {config.data.root} <= set(limits.flagged) <= {config.data.root, config.data.root + ood.CLEAR}
    reported = {f"report/{name}" for name in (ood.SCORES, ood.SUMMARY, ood.METHODS)}
    assert set(loaded.manifest.files) == {store.WEIGHTS, "report/a.txt", FILE, *reported}
    held_out = dataset.images[dataset.split(config.data.held_out_fold).held_out][:4].numpy()
    features = OpenVinoEngine(loaded, precision="float32").run(held_out).features
    assert features is not None
    assert all((score_of(row, loaded.familiar) or 0) <= limits.threshold * 1.001 for row in features)


def test_a_version_on_other_images_is_refused(tmp_path: Path, random_weights: bytes) -> None:
    config = load_config(SMOKE).model_dump(mode="json")
    store.publish(tmp_path, make_manifest(training_config=config), {store.WEIGHTS: random_weights})
    with pytest.raises(SystemExit, match="trained on other images"):
        ood.main(["--version", str(tmp_path / NAME / "1"), "--out", str(tmp_path)])
