"""What of nvJPEG runs without a GPU: the same calls on the CPU, and the refusal."""

import numpy as np
import pytest

from app.engines.base import EngineUnavailable, build_decoder
from app.engines.nvjpeg import NvJpeg
from app.model.preprocess import decode
from tests.conftest import encode
from training.drawn import draw_lesion


def test_it_decodes_as_pillow_does_within_a_level_or_two() -> None:
    data = encode(draw_lesion(1, 5, size=(1800, 1200)), "JPEG", quality=95)
    found, expected = NvJpeg("cpu")(data, 224), decode(data).pixels
    assert found.shape == (3, 224, 224)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 2


def test_a_damaged_file_is_a_value_error() -> None:
    data = encode(draw_lesion(1, 5), "JPEG")
    with pytest.raises(ValueError, match="not decoded"):
        NvJpeg("cpu")(data[:100], 224)


def test_without_a_gpu_it_is_refused_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="use pillow"):
        build_decoder("nvjpeg")
    assert build_decoder("pillow") is None
