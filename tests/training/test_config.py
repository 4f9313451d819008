from pathlib import Path

import pytest

from tests.conftest import ROOT
from training.config import load_config

CONFIGS = sorted((ROOT / "training" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.epochs == sum(phase.epochs for phase in config.phases)


def test_phases_follow_each_other() -> None:
    config = load_config(ROOT / "training" / "configs" / "smoke.toml")
    first, second = config.phases
    assert config.phase_of(0) == (first, 0)
    assert config.phase_of(first.epochs) == (second, 0)
    assert config.phase_of(config.epochs - 1) == (second, second.epochs - 1)
    with pytest.raises(ValueError, match="past the end"):
        config.phase_of(config.epochs)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("batch_size = 10", "batch_size = 0", "optimisation.batch_size"),
        ("seed = 7", "sed = 7", "seed"),
        ('gate = "branch_softmax"', 'gate = "none at all"', "model.gate"),
        ("held_out_fold = 0", "held_out_fold = 4", "4 of 4 folds"),
        ("size = 64", "size = 65", "phases.0.size"),
        ("held_out_fold = 0", "held_out_fold = 0\nroot_share = 0", "an epoch without images"),
        (
            "held_out_fold = 0",
            'held_out_fold = 0\nextra = "b"\nroot_share = 0\nextra_share = 0',
            "an epoch without images",
        ),
        ("seed = 7", "seed =", "not TOML"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (ROOT / "training" / "configs" / "smoke.toml").read_text()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=says):
        load_config(path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such config"):
        load_config(tmp_path / "absent.toml")
