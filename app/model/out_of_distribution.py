"""How far an image lies from those that a version was fitted on, from what its head sees of it.

The squared Mahalanobis distance under probabilistic PCA (Tipping and Bishop 1999): a covariance whose leading
directions are kept and whose rest has one variance, so that a few thousand images are enough for 1024 features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FILE = "out_of_distribution.safetensors"  # in a version's folder
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Familiar:
    """The images that a version knows, as a Gaussian over the pooled features."""

    mean: Floats  # [C]
    axes: Floats  # [C,Q], orthonormal
    deviations: Floats  # [Q], standard deviation along each axis
    rest: float  # standard deviation in any other direction

    def score(self, features: Floats) -> NDArray[np.float64]:
        """float32[...,C] -> distances [...], near 1 for the images that it was fitted on."""
        centred = features - self.mean
        along = centred @ self.axes
        left = np.maximum(np.square(centred).sum(axis=-1) - np.square(along).sum(axis=-1), 0)
        squared = np.square(along / self.deviations).sum(axis=-1) + left / self.rest**2
        return np.asarray(np.sqrt(squared.astype(np.float64) / features.shape[-1]))

    def arrays(self) -> dict[str, Floats]:
        """What `from_arrays` takes."""
        rest = np.array([self.rest], dtype=np.float32)
        return {"mean": self.mean, "axes": self.axes, "deviations": self.deviations, "rest": rest}


def from_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> Familiar:
    """The stored statistics, in float32 whatever they were stored in.

    Raises:
        ValueError: an array is missing, or their shapes do not fit.
    """
    try:
        mean, axes, deviations, rest = (arrays[k].astype(np.float32) for k in ("mean", "axes", "deviations", "rest"))
    except KeyError as error:
        raise ValueError(f"{FILE} has no {error.args[0]}") from None
    if axes.shape != (*mean.shape, *deviations.shape) or rest.shape != (1,) or not (deviations.all() and rest.all()):
        raise ValueError(f"the arrays of {FILE} do not fit each other")
    return Familiar(mean, axes, deviations, float(rest[0]))


def score_of(features: Floats | None, familiar: Familiar | None) -> float | None:
    """The score of one image by its features [C], where the engine and the version tell."""
    return None if features is None or familiar is None else float(familiar.score(features))
