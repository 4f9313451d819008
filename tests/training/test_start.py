from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from app.model import store
from tests.conftest import NAME, ROOT, make_manifest, random_model
from training.config import Config, load_config
from training.data import Dataset
from training.start import load_start, refuse_seen, with_version

SMOKE = load_config(ROOT / "training" / "configs" / "smoke.toml")


def trained_on(root: str, *, start: str = "random", fold: int = 0, extra: str | None = None) -> Config:
    fields = SMOKE.model_dump()
    data = fields["data"] | {"root": root, "extra": extra, "held_out_fold": fold}
    return Config.model_validate(fields | {"data": data, "model": fields["model"] | {"start": start}})


def publish(root: Path, version: str, config: Config, **changes: Any) -> Path:
    manifest = make_manifest(version, training_config=config.model_dump(mode="json"), **changes)
    store.publish(root, manifest, {store.WEIGHTS: safetensors.numpy.save({"w": np.zeros(1, dtype=np.float32)})})
    return root / NAME / version


def test_a_version_starts_a_run_with_its_own_function(model_store: Path) -> None:
    model = random_model("branch_softmax", seed=5)
    load_start(model, f"version:{model_store / NAME / '1'}", classes=["benign", "malignant"])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = random_model("branch_softmax")(images).logits  # what the store's version was made from
        assert torch.allclose(model(images).logits, expected, atol=0.05)  # it was rounded to float16


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["melanoma", "nevus"], ["malignant", "benign"]])
def test_with_other_classes_the_last_layer_stays_as_drawn(model_store: Path, classes: list[str]) -> None:
    model = random_model("branch_softmax", seed=5, classes=len(classes))
    drawn = model.head.fc2.weight.clone()
    load_start(model, f"version:{model_store / NAME / '1'}", classes=classes)
    assert torch.equal(model.head.fc2.weight, drawn)
    assert not torch.equal(model.head.fc1.weight, random_model("branch_softmax", seed=5).head.fc1.weight)


@pytest.mark.parametrize("gate", [None, "channel_softmax"])
def test_a_start_of_another_architecture_is_refused(model_store: Path, gate: Any) -> None:
    with pytest.raises(ValueError, match="another architecture"):
        load_start(random_model(gate), f"version:{model_store / NAME / '1'}", classes=["benign", "malignant"])


def images(fingerprint: str, root_fingerprint: str = "f" * 64) -> Dataset:
    nothing = np.zeros(0, dtype=np.int64)
    pixels, labels = torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0)
    return Dataset(pixels, labels, [], nothing, nothing.astype(bool), fingerprint, root_fingerprint)


def test_a_start_that_saw_the_held_out_fold_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path, "1", trained_on("skin", extra="clinics"))
    own = trained_on("skin", start=f"version:{folder}", extra="clinics")
    refuse_seen(own, images("0" * 64))  # the very data and fold that the version held out
    for config, dataset in (
        (own, images("1" * 64)),
        (own.with_fold(1), images("0" * 64)),
        (trained_on("clinics", start=f"version:{folder}"), images("1" * 64)),
    ):
        with pytest.raises(ValueError, match="may have seen the held-out fold"):
            refuse_seen(config, dataset)
        refuse_seen(config.with_fold(-1), dataset)
    refuse_seen(trained_on("elsewhere", start=f"version:{folder}"), images("2" * 64))


def test_a_second_folder_may_join_the_images_of_the_start(tmp_path: Path) -> None:
    folder = publish(tmp_path, "1", trained_on("skin"))
    config = trained_on("skin", start=f"version:{folder}", extra="clinics")
    refuse_seen(config, images("1" * 64, root_fingerprint="0" * 64))
    with pytest.raises(ValueError, match="may have seen the held-out fold"):
        refuse_seen(config, images("1" * 64, root_fingerprint="2" * 64))


def test_what_the_start_of_a_start_saw_counts_too(tmp_path: Path) -> None:
    first = publish(tmp_path, "1", trained_on("skin"))
    second = publish(tmp_path, "2", trained_on("clinics", start=f"version:{first}"))
    with pytest.raises(ValueError, match="was trained on skin"):
        refuse_seen(trained_on("skin", start=f"version:{second}"), images("1" * 64))
    config = with_version(trained_on("third"), second)
    assert config.data.without == ["clinics", "skin"]
    assert config.model.start == f"version:{second}"
    assert config.model.gate == "branch_softmax"


def test_what_a_start_that_is_gone_saw_is_known_from_the_version_after_it(tmp_path: Path) -> None:
    gone = f"version:{tmp_path / NAME / '1'}"
    config = trained_on("clinics", start=gone)
    config = config.model_copy(update={"data": config.data.model_copy(update={"without": ["skin"]})})
    second = publish(tmp_path, "2", config)
    with pytest.raises(ValueError, match="no longer here and was trained on skin"):
        refuse_seen(trained_on("skin", start=f"version:{second}"), images("1" * 64))
    assert with_version(trained_on("third"), second).data.without == ["clinics", "skin"]


def test_a_younger_version_in_the_place_of_a_start_is_not_what_a_version_came_from(tmp_path: Path) -> None:
    """A store made anew gave its numbers a second time: the two would have been each other's start for ever."""
    gone = f"version:{tmp_path / NAME / '1'}"
    config = trained_on("clinics", start=gone)
    config = config.model_copy(update={"data": config.data.model_copy(update={"without": ["skin"]})})
    second = publish(tmp_path, "2", config)
    later = make_manifest().created + timedelta(seconds=1)
    first = publish(tmp_path, "1", trained_on("skin", start=f"version:{second}"), created=later)
    assert with_version(trained_on("third"), first).data.without == ["clinics", "skin"]
    with pytest.raises(ValueError, match="no longer here and was trained on skin"):
        refuse_seen(trained_on("skin", start=f"version:{second}"), images("1" * 64))


def test_a_run_crops_frames_where_its_start_does_or_it_says_so_itself(tmp_path: Path) -> None:
    prepared = make_manifest().preprocessing
    for number, start_crops in enumerate((False, True)):
        changes = {"preprocessing": prepared.model_copy(update={"crop_frame": start_crops})}
        folder = publish(tmp_path, str(number), trained_on("skin"), **changes)
        config = trained_on("clinics")
        cropping = config.model_copy(update={"data": config.data.model_copy(update={"crop_frame": True})})
        assert with_version(config, folder).data.crop_frame == start_crops
        assert with_version(cropping, folder).data.crop_frame
