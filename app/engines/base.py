"""What serving needs of an engine, and the choice of one."""

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

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


class Choice(NamedTuple):
    engine: Literal["cuda", "openvino", "torch"]
    why: str


class DeviceMemory(NamedTuple):
    """Of the whole device, whoever uses it."""

    used_bytes: int
    total_bytes: int


@runtime_checkable
class HasMemory(Protocol):
    """An engine whose device has memory of its own."""

    def memory(self) -> DeviceMemory:
        """What is used now, from any thread."""
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
    engine = choose_engine(name).engine
    if engine == "cuda":
        own_precision("cuda", wanted=precision)
        from app.engines.cuda_engine import CudaEngine

        return CudaEngine(version)
    if engine == "torch":
        from app.engines.torch_engine import TorchEngine

        own_precision("torch", wanted=precision)
        return TorchEngine(version, device="cpu", threads=threads)
    from app.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(version, precision=precision, threads=threads)


def choose_engine(name: EngineName) -> Choice:
    """What `build_engine` takes for that name; imports torch where there may be a CUDA device.

    Raises:
        EngineUnavailable: there is no such device, or no torch to ask for it.
    """
    if name == "torch" and importlib.util.find_spec("torch") is None:
        raise EngineUnavailable("DERMLENS_ENGINE=torch, but torch is not installed: use auto")
    if name in ("openvino", "torch"):
        return Choice(name, f"DERMLENS_ENGINE={name}")
    if name == "auto" and not nvidia_driver():
        return Choice("openvino", "there is no NVIDIA driver")
    try:
        from app.engines.torch_engine import cuda_available
    except ModuleNotFoundError as error:
        why = f"{error.name} is not installed"
    else:
        if cuda_available():
            return Choice("cuda", "torch sees a CUDA device")
        why = "torch sees no CUDA device"
    if name == "cuda":
        raise EngineUnavailable(f"DERMLENS_ENGINE=cuda, but {why}: use auto, or check the driver")
    return Choice("openvino", why)


def context_lost(error: Exception) -> bool:
    """Whether an error of torch means that CUDA answers nothing any more in this process.

    After a fault in a kernel every call fails with "CUDA error: …" (CUDA runtime API, "sticky" errors); running out of
    memory, a wrong argument and a call that is not allowed while a graph is captured leave the context as it was.
    """
    message = str(error)
    mild = ("out of memory", "invalid argument", "stream is capturing")
    return "CUDA error" in message and not any(words in message for words in mild)


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


def own_precision(engine: Literal["cuda", "torch"], *, wanted: str) -> str:
    """What an engine with one precision computes in.

    Raises:
        EngineUnavailable: another one is wanted.
    """
    own = {"cuda": "float16", "torch": "float32"}[engine]
    if wanted not in ("auto", own):
        raise EngineUnavailable(f"DERMLENS_PRECISION={wanted}, but the {engine} engine computes in {own}: use auto")
    return own


def warm_up(engine: Engine, *, size: int, max_batch: int) -> None:
    """Run every batch size, as many at once as there may be, so that no request pays for lazy initialisation.

    Raises:
        ValueError: the network gives no finite answer.
    """
    with ThreadPoolExecutor(engine.in_flight) as threads:
        for batch in range(1, max_batch + 1):
            images = np.zeros((batch, 3, size, size), dtype=np.uint8)
            for output in threads.map(engine.run, engine.in_flight * [images]):
                if not np.isfinite(output.logits).all():
                    raise ValueError("the network gives no finite answer: its weights are damaged")
