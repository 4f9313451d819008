"""What serving needs of an engine, and the choice of one."""

import ctypes
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from app.model.overlay import Method
from app.model.preprocess import JpegDecoder

if TYPE_CHECKING:  # the routes know engines, and nothing of the store
    from app.model.store import LoadedVersion

EngineName = Literal["auto", "cuda", "openvino", "torch"]
Precision = Literal["float32", "bfloat16", "int8"]
DecoderName = Literal["pillow", "nvjpeg"]


class Output(NamedTuple):
    """Arrays of one batch; B as in the input."""

    logits: NDArray[np.float32]  # [B,K]
    cam: NDArray[np.float32]  # [B,K,H,W], signed, before ReLU
    features: NDArray[np.float32] | None = None  # [B,C], what the head sees; None from an older int8 graph


class Engine(Protocol):
    """Runs batches of one model version on one device."""

    name: str
    device: str
    in_flight: int  # threads that may be in `run` at once

    @property
    def precision(self) -> str: ...

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] RGB -> `Output`."""
        ...

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        """uint8[3,S,S] -> signed map float32[H,W] in logits: positive where the image argues for class `target`.

        For one thread alone, and never beside `run`: it takes many passes, or gradients.

        Raises:
            MethodUnavailable: torch or captum is not installed.
        """
        ...


class DeviceLost(RuntimeError):
    """The device answers every call with an error from now on; only a new process gets it back."""


class MethodUnavailable(RuntimeError):
    """A method of attribution whose library is not installed."""


class EngineUnavailable(RuntimeError):
    """The engine that was asked for cannot run here."""


def build_engine(
    name: EngineName, version: "LoadedVersion", *, precision: Literal["auto"] | Precision = "auto", threads: int = 0
) -> Engine:
    """The engine of that name, loaded; `auto` takes CUDA where there is one, else OpenVINO.

    Args:
        precision: of OpenVINO, see `openvino_engine.choose_precision`; the others have one each.
        threads: CPU threads of a forward pass, 0 for the library's default.

    Raises:
        EngineUnavailable: there is no such device, or it does not compute in that precision.
        ValueError: the weights do not fit.
    """
    if name == "cuda" or (name == "auto" and nvidia_driver()):
        from app.engines.torch_engine import cuda_available

        if cuda_available():
            _only_auto(precision, engine="cuda", own="float16")
            from app.engines.cuda_engine import CudaEngine

            return CudaEngine(version)
        if name == "cuda":
            raise EngineUnavailable(
                "DERMLENS_ENGINE=cuda, but torch sees no CUDA device: use auto, or check the driver"
            )
    if name == "torch":
        from app.engines.torch_engine import TorchEngine

        _only_auto(precision, engine="torch", own="float32")
        return TorchEngine(version, device="cpu", threads=threads)
    from app.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(version, precision=precision, threads=threads)


def context_lost(error: Exception) -> bool:
    """Whether an error of torch means that CUDA answers nothing any more in this process.

    After a fault in a kernel every call fails with "CUDA error: …" (CUDA runtime API, "sticky" errors); running out of
    memory and a wrong argument leave the context as it was.
    """
    message = str(error)
    return "CUDA error" in message and not any(mild in message for mild in ("out of memory", "invalid argument"))


def build_decoder(name: DecoderName) -> JpegDecoder | None:
    """What decodes JPEGs in place of Pillow; None for Pillow itself.

    Raises:
        EngineUnavailable: there is no CUDA device.
    """
    if name == "pillow":
        return None
    from app.engines.nvjpeg import NvJpeg

    return NvJpeg()


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed: milliseconds, where asking torch costs seconds and its memory."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _only_auto(precision: str, *, engine: str, own: str) -> None:
    if precision not in ("auto", own):
        raise EngineUnavailable(f"DERMLENS_PRECISION={precision}, but the {engine} engine computes in {own}: use auto")


def warm_up(engine: Engine, *, size: int, max_batch: int) -> None:
    """Run every batch size once, so that no request pays for lazy initialisation.

    Raises:
        ValueError: the network gives no finite answer.
    """
    for batch in range(1, max_batch + 1):
        if not np.isfinite(engine.run(np.zeros((batch, 3, size, size), dtype=np.uint8)).logits).all():
            raise ValueError("the network gives no finite answer: its weights are damaged")
