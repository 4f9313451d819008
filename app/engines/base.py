"""What serving needs of an engine, and the choice of one."""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from app.model.overlay import Method
from app.model.store import LoadedVersion

EngineName = Literal["auto", "cuda", "torch"]


class Output(NamedTuple):
    """Arrays of one batch; B as in the input."""

    logits: NDArray[np.float32]  # [B,K]
    cam: NDArray[np.float32]  # [B,K,H,W], signed, before ReLU


class Engine(Protocol):
    """Runs batches of one model version on one device; called from one thread at a time."""

    name: str
    device: str

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] RGB -> `Output`."""
        ...


@runtime_checkable
class Attributing(Protocol):
    """An engine that explains by methods which need gradients or many passes; called as `run` is."""

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        """uint8[3,S,S] -> signed map float32[H,W] in logits: positive where the image argues for class `target`."""
        ...


class EngineUnavailable(RuntimeError):
    """The engine that was asked for cannot run here."""


def build_engine(name: EngineName, version: LoadedVersion, *, threads: int) -> Engine:
    """The engine of that name, loaded; `auto` takes CUDA where there is one, else the CPU.

    Args:
        threads: CPU threads of a forward pass, 0 for the library's default.

    Raises:
        EngineUnavailable: there is no such device.
        ValueError: the weights do not fit.
    """
    from app.engines.torch_engine import TorchEngine, cuda_available

    if name == "cuda" and not cuda_available():
        raise EngineUnavailable("DERMLENS_ENGINE=cuda, but torch sees no CUDA device: use auto, or check the driver")
    device: Literal["cpu", "cuda"] = "cuda" if name == "cuda" or (name == "auto" and cuda_available()) else "cpu"
    return TorchEngine(version, device=device, threads=threads)


def warm_up(engine: Engine, *, size: int, max_batch: int) -> None:
    """Run the smallest and the largest batch once, so that no request pays for lazy initialisation."""
    for batch in sorted({1, max_batch}):
        engine.run(np.zeros((batch, 3, size, size), dtype=np.uint8))
