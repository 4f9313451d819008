"""What of the CUDA engine can be seen without a GPU."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from app.engines import cuda_engine
from app.engines.cuda_engine import CudaEngine
from app.model import store
from app.model.architecture import LesionNet
from tests.conftest import NAME


def test_the_weights_live_as_long_as_the_engine(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[LesionNet]] = []

    class Slot:
        """As a captured graph: it holds no reference to the network."""

        def __init__(self, model: LesionNet, **_: object) -> None:
            seen.append(weakref.ref(model))

    monkeypatch.setattr(cuda_engine, "_Slot", Slot)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    engine = CudaEngine(store.load(model_store, NAME, "1"))
    gc.collect()
    assert [ref() is not None for ref in seen] == [True] * engine.in_flight
    del engine
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
