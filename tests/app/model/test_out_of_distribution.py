import numpy as np
import pytest

from app.model.out_of_distribution import Familiar, from_arrays, score_of


def gaussian() -> Familiar:
    """Three features: one of deviation 10, the others of deviation 2, around (1, 2, 3)."""
    axes = np.array([[0], [1], [0]], dtype=np.float32)
    return Familiar(np.array([1, 2, 3], np.float32), axes, np.array([10], np.float32), 2.0)


def test_a_score_is_the_distance_in_deviations_along_each_direction() -> None:
    points = np.array([[1, 2, 3], [1, 12, 3], [3, 2, 3], [3, 12, 5]], dtype=np.float32)
    assert gaussian().score(points) == pytest.approx(np.sqrt(np.array([0, 1, 1, 3]) / 3))


def test_the_images_that_it_was_fitted_on_score_near_one() -> None:
    points = np.random.default_rng(0).normal(0, 1, (2000, 3)) * [2, 10, 2] + [1, 2, 3]
    assert np.square(gaussian().score(points.astype(np.float32))).mean() == pytest.approx(1, rel=0.05)


def test_it_is_stored_and_read_back_in_any_precision() -> None:
    stored = {name: array.astype(np.float16) for name, array in gaussian().arrays().items()}
    point = np.array([3, 12, 5], dtype=np.float32)
    assert from_arrays(stored).score(point) == gaussian().score(point)


@pytest.mark.parametrize(
    "change",
    [
        {"axes": None},
        {"axes": np.ones((3, 2), np.float32)},
        {"mean": np.ones(2, np.float32)},
        {"rest": np.zeros(1, np.float32)},
        {"deviations": np.zeros(1, np.float32)},
    ],
)
def test_statistics_that_do_not_fit_are_refused(change: dict[str, np.ndarray | None]) -> None:
    arrays = {k: v for k, v in (gaussian().arrays() | change).items() if v is not None}
    with pytest.raises(ValueError, match="out_of_distribution"):
        from_arrays(arrays)


def test_there_is_no_score_where_the_engine_or_the_version_does_not_tell() -> None:
    point = np.array([1, 2, 3], dtype=np.float32)
    assert score_of(None, gaussian()) is None
    assert score_of(point, None) is None
    assert score_of(point, gaussian()) == 0
