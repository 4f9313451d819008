import re
from typing import Any

import numpy as np
import pytest

from app.model.metadata import FIELDS, PLACES, SITES, WIDTH, Field, Metadata, from_arrays, fuse
from tests.conftest import random_fusion

EVERYTHING = Metadata(age=80, sex="male", site="palms/soles")
LOGITS = np.random.default_rng(1).normal(0, 3, (50, 2)).astype(np.float32)


def test_without_metadata_logits_stay_as_they_are_bit_for_bit() -> None:
    for logits in LOGITS:
        assert fuse(logits, Metadata(), random_fusion()).tobytes() == logits.tobytes()
    nothing = np.zeros((len(LOGITS), WIDTH), dtype=np.float32)
    assert random_fusion()(LOGITS, nothing).tobytes() == LOGITS.tobytes()  # whatever the weights


def test_each_field_moves_the_logits_and_a_version_without_a_head_stays() -> None:
    for known in (EVERYTHING, Metadata(age=0), Metadata(sex="female"), Metadata(site="head/neck")):
        fused = fuse(LOGITS[0], known, random_fusion())
        assert fused.dtype == np.float32
        assert not np.allclose(fused, LOGITS[0])
        assert fuse(LOGITS[0], known, None).tobytes() == LOGITS[0].tobytes()


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_zeros_and_one_that_is_known_says_so(field: Field) -> None:
    values = {name: getattr(EVERYTHING, name) for name in FIELDS if name != field}
    code = Metadata(**values).encode()
    assert not code[PLACES[field]].any()
    assert all(code[PLACES[name]][0] == 1 for name in values)
    assert Metadata(**values).known == tuple(values)


def test_every_value_has_an_encoding_of_its_own() -> None:
    every = [Metadata(age=age) for age in (0, 50, 120)]  # 50 lies in the middle of the scale, and is not missing
    every += [Metadata(sex="female"), Metadata(sex="male"), *(Metadata(site=site) for site in SITES), Metadata()]
    assert len({known.encode().tobytes() for known in every}) == len(every)
    assert all(np.abs(known.encode()).max() <= 3 for known in every)


@pytest.mark.parametrize(
    "value",
    [{"age": -1}, {"age": 120.5}, {"age": float("nan")}, {"sex": "unknown"}, {"site": "elbow"}],
)
def test_what_is_not_valid_is_refused_without_quoting_it(value: dict[str, Any]) -> None:
    ((field, given),) = value.items()
    with pytest.raises(ValueError, match=f"^{field}: give ") as raised:
        Metadata(**value)
    assert str(given) not in str(raised.value)


def test_no_message_shows_a_value() -> None:
    told = re.sub(r"0x[0-9a-f]+", "", repr(EVERYTHING) + str(EVERYTHING))  # an address may hold any digits
    assert not [value for value in ("80", "male", "palms") if value in told]


def test_a_head_is_stored_and_read_back_in_any_precision() -> None:
    arrays = {name: array.astype(np.float16) for name, array in random_fusion().arrays().items()}
    again = from_arrays(arrays, classes=2)
    code = EVERYTHING.encode()
    assert again(LOGITS, code) == pytest.approx(random_fusion()(LOGITS, code), abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": None},
        {"hidden": np.ones((4, WIDTH), np.float32)},
        {"bias": np.ones((4, 1), np.float32)},
        {"out": np.ones((3, 4), np.float32)},
        {"out": np.full((2, 4), np.inf, np.float32)},
    ],
)
def test_a_head_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    arrays = {k: v for k, v in (random_fusion().arrays() | change).items() if v is not None}
    with pytest.raises(ValueError, match=r"metadata\.safetensors"):
        from_arrays(arrays, classes=2)
