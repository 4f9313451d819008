import numpy as np
import pytest
from numpy.typing import NDArray

from training.artefacts import draw_hairs, lay_over
from training.lesion_mask import lesion_mask, otsu

SIDE = 224
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def ellipse(y: float, x: float, height: float, width: float) -> NDArray[np.bool_]:
    return np.asarray(((Y - y) / height) ** 2 + ((X - x) / width) ** 2 < 1)


def skin(seed: int = 0) -> NDArray[np.float32]:
    """float32[3,224,224], uneven by noise alone."""
    noise = np.random.default_rng(seed).normal(0, 5, (SIDE, SIDE))
    return np.asarray(np.array([222, 178, 154])[:, None, None] + noise, dtype=np.float32)


def with_spot(image: NDArray[np.float32], spot: NDArray[np.bool_], *, darker: float = 90) -> NDArray[np.float32]:
    return np.asarray(image - darker * spot, dtype=np.float32)


def mask_of(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    return lesion_mask(image.clip(0, 255).astype(np.uint8))


def likeness(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((found & truth).sum() / (found | truth).sum())


LESION = ellipse(118, 104, 45, 32)


def test_a_spot_is_found_with_its_outline() -> None:
    found = mask_of(with_spot(skin(), LESION))
    assert found.dtype == bool
    assert found.shape == (SIDE, SIDE)
    assert likeness(found, LESION) > 0.9


def test_a_light_middle_belongs_to_the_lesion() -> None:
    ring = LESION & ~ellipse(118, 104, 18, 12)
    assert likeness(mask_of(with_spot(skin(), ring)), LESION) > 0.9


def test_hairs_across_change_little() -> None:
    hairs = draw_hairs(SIDE, count=15, rng=np.random.default_rng(1))
    hairy = lay_over(with_spot(skin(), LESION), hairs, colour=(40.0, 30.0, 25.0))
    assert likeness(mask_of(hairy), LESION) > 0.85


@pytest.mark.parametrize("light", [X / SIDE - 0.5, ((X - 112) ** 2 + (Y - 112) ** 2) / 112**2 / 2])
def test_a_small_spot_is_found_in_uneven_light(light: NDArray[np.float32]) -> None:
    small = ellipse(118, 104, 14, 11)
    assert likeness(mask_of(with_spot(skin() - 120 * light, small, darker=60)), small) > 0.6


def test_the_black_tube_is_no_lesion() -> None:
    field = ellipse(112, 112, 100, 100)
    found = mask_of(np.where(field, with_spot(skin(), LESION), 12))
    assert likeness(found, LESION) > 0.85
    assert not mask_of(np.where(field, skin(), 12)).any()


def test_a_darker_spot_in_the_corner_and_a_sticker_are_passed_over() -> None:
    image = with_spot(with_spot(skin(), LESION, darker=60), ellipse(215, 215, 50, 50), darker=110)
    image[:, :60, :60] = np.array([20, 120, 230])[:, None, None]
    assert likeness(mask_of(image), LESION) > 0.85


def test_bare_skin_has_no_mask() -> None:
    assert not any(mask_of(skin(seed)).any() for seed in range(5))
    assert not mask_of(np.zeros((3, SIDE, SIDE), dtype=np.float32)).any()
    assert not mask_of(np.full((3, SIDE, SIDE), 200, dtype=np.float32)).any()


def test_other_shapes_of_picture() -> None:
    wide = with_spot(skin(), LESION)[:, 40:200]
    found = mask_of(wide)
    assert found.shape == (160, SIDE)
    assert likeness(found, LESION[40:200]) > 0.9


def test_otsu_parts_two_groups() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(m, 1, 500) for m in (10, 30)]).astype(np.float32)
    assert 13 < otsu(values) < 27
