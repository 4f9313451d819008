"""What else is known of a lesion, and the small head that moves an image's logits by it. Experimental.

Late fusion: the network answers from the image as ever, and where nothing else is known its logits stay as they are,
bit for bit (docs/decisions/017-metadata.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

FILE: Final = "metadata.safetensors"  # in a version's folder
Field = Literal["age", "sex", "site"]
Sex = Literal["female", "male"]
Site = Literal[  # `anatom_site_general` of the ISIC archive, as the challenge of 2019 has it
    "anterior torso",
    "head/neck",
    "lateral torso",
    "lower extremity",
    "oral/genital",
    "palms/soles",
    "posterior torso",
    "upper extremity",
]
FIELDS: tuple[Field, ...] = get_args(Field)
SEXES: tuple[Sex, ...] = get_args(Sex)
SITES: tuple[Site, ...] = get_args(Site)
OLDEST = 120  # years
WIDTH = 5 + len(SITES)
PLACES: Mapping[Field, slice] = {"age": slice(0, 2), "sex": slice(2, 4), "site": slice(4, WIDTH)}  # in an encoding
Floats = NDArray[np.float32]


@dataclass(frozen=True, repr=False)  # without a repr no message can quote a patient
class Metadata:
    """Each field is None where it is not known; raises ValueError for one that is not valid."""

    age: float | None = None  # years
    sex: Sex | None = None
    site: Site | None = None

    def __post_init__(self) -> None:
        if self.age is not None and not 0 <= self.age <= OLDEST:
            raise ValueError(f"age: give 0 to {OLDEST} years")
        if self.sex not in (None, *SEXES):
            raise ValueError(f"sex: give {' or '.join(SEXES)}")
        if self.site not in (None, *SITES):
            raise ValueError(f"site: give one of {', '.join(SITES)}")

    @property
    def known(self) -> tuple[Field, ...]:
        """The fields that are."""
        return tuple(field for field in FIELDS if getattr(self, field) is not None)

    def encode(self) -> Floats:
        """float32[WIDTH]: of each field 1 and its value, or zeros where it is missing."""
        code = np.zeros(WIDTH, dtype=np.float32)
        if self.age is not None:
            code[PLACES["age"]] = 1, (self.age - 50) / 25
        if self.sex is not None:
            code[PLACES["sex"]] = 1, 1 if self.sex == "male" else -1
        if self.site is not None:
            code[PLACES["site"]] = 1, *(site == self.site for site in SITES)
        return code


@dataclass(frozen=True)
class Fusion:
    """z + h(z, m) − h(z, 0) for logits z and an encoding m, where h is one hidden layer of H units.

    The difference makes an empty encoding change nothing, whatever the weights.
    """

    hidden: Floats  # [H,K+WIDTH]
    bias: Floats  # [H]
    out: Floats  # [K,H]

    def __call__(self, logits: Floats, code: Floats) -> Floats:
        """float32[...,K] logits of images and [...,WIDTH] encodings -> logits [...,K]."""
        classes = logits.shape[-1]
        alone = logits @ self.hidden[:, :classes].T + self.bias
        both = alone + code @ self.hidden[:, classes:].T
        moved = (np.maximum(both, 0) - np.maximum(alone, 0)) @ self.out.T
        return np.asarray(logits + moved, dtype=np.float32)

    def arrays(self) -> dict[str, Floats]:
        """What `from_arrays` takes."""
        return {"hidden": self.hidden, "bias": self.bias, "out": self.out}


def from_arrays(arrays: Mapping[str, NDArray[np.generic]], *, classes: int) -> Fusion:
    """The stored head, in float32 whatever it was stored in.

    Raises:
        ValueError: an array is missing or not finite, or they fit neither each other nor the number of classes.
    """
    try:
        hidden, bias, out = (arrays[name].astype(np.float32) for name in ("hidden", "bias", "out"))
    except KeyError as error:
        raise ValueError(f"{FILE} has no {error.args[0]}") from None
    units = bias.shape
    if len(units) != 1 or hidden.shape != (*units, classes + WIDTH) or out.shape != (classes, *units):
        raise ValueError(f"the arrays of {FILE} do not fit each other and {classes} classes")
    if not all(np.isfinite(array).all() for array in (hidden, bias, out)):
        raise ValueError(f"the arrays of {FILE} are not finite")
    return Fusion(hidden, bias, out)


def fuse(logits: Floats, metadata: Metadata, fusion: Fusion | None) -> Floats:
    """Logits [K] of one image with what is known of it; the very same where nothing is, or the version has no head."""
    return logits if fusion is None or not metadata.known else fusion(logits, metadata.encode())
