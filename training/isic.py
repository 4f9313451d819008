"""Which collection of ISIC 2019 an image is of, by its number in the archive."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# The three that the challenge of 2019 pooled: Memorial Sloan Kettering, Vienna and Queensland, Barcelona
COLLECTIONS = {"MSK": range(24_306), "HAM10000": range(24_306, 34_321), "BCN20000": range(53_000, 80_000)}
NUMBER = re.compile(r"ISIC_(\d{7})")


def collections(names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Collection -> which of N images are of it, by their file names; those without an archive number are of none."""
    numbers = np.array([int(found[1]) if (found := NUMBER.search(name)) else -1 for name in names])
    return {name: (numbers >= span.start) & (numbers < span.stop) for name, span in COLLECTIONS.items()}
