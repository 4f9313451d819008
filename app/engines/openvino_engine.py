"""OpenVINO on the CPU, in the fastest arithmetic that the processor and the version allow; torch is not imported."""

import functools
from typing import Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from app.engines.base import Engine, EngineUnavailable, MethodUnavailable, Output, Precision
from app.engines.buckets import Slots
from app.model.openvino_graph import build_graph
from app.model.overlay import Method
from app.model.store import LoadedVersion

# What OpenVINO computes in; what an int8 graph leaves out stays in float32, also where bfloat16 would be at hand
HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
IN_FLIGHT = 2  # batches, where there are threads for each


class OpenVinoEngine:
    """One version on the CPU. A batch that comes alone takes all its threads; batches beside one another share them.

    Threads of one batch wait for one another at every layer, so that whatever else runs on one core, decoding for
    instance, stops them all; two batches do not wait for each other (docs/decisions/020-two-batches.md).
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self, version: LoadedVersion, *, precision: Literal["auto"] | Precision = "auto", threads: int = 0
    ) -> None:
        core = the_core()
        self.precision = choose_precision(precision, version, bfloat16=computes_bfloat16())
        self._version = version
        self._threads = threads
        # Pinned, the threads of each compiled model, and of the next server on the machine, would hold the same cores
        options = {"INFERENCE_PRECISION_HINT": HINTS[self.precision], "ENABLE_CPU_PINNING": "NO"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        if self.precision == "int8" and version.int8:
            graph = core.read_model(*version.int8)
        else:
            graph = build_graph(version.manifest, version.weights)
        self._outputs = Output._fields[: len(graph.outputs)]  # int8 graphs were once stored without the features
        if version.familiar and "features" not in self._outputs:
            raise ValueError(f"{graph.get_friendly_name()} in int8 gives no features: run training.quantize again")
        whole = core.compile_model(graph, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})
        self._alone = whole.create_infer_request()
        self.in_flight = min(IN_FLIGHT, whole.get_property("INFERENCE_NUM_THREADS"))
        if self.in_flight == 1:
            self._requests = Slots([self._alone])
        else:
            shared = core.compile_model(graph, "CPU", options | {"NUM_STREAMS": str(self.in_flight)})
            self._requests = Slots(shared.create_infer_request() for _ in range(self.in_flight))

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] -> `Output`, the map float32[B,K,S/16,S/16]."""
        with self._requests.take() as shared:
            # Nobody else sees every other request free until this one is given back
            request = self._alone if self._requests.free == self.in_flight - 1 else shared
            request.infer([images], share_inputs=True)
            return Output(*(request.get_tensor(name).data.copy() for name in self._outputs))

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        """As `TorchEngine.attribute`, whose network the first call builds."""
        return self._reference.attribute(image, method, target=target)

    @functools.cached_property
    def _reference(self) -> Engine:
        """torch, imported for the few who ask for its methods."""
        try:
            from app.engines.torch_engine import TorchEngine
        except ModuleNotFoundError as error:
            raise MethodUnavailable(f"this server has no {error.name}: gradcam is what it can draw") from error

        return TorchEngine(self._version, device="cpu", threads=self._threads)


def computes_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16, AMX)."""
    return "BF16" in the_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def the_core() -> ov.Core:
    """One for the process: with the last one the CPU plugin is unloaded, maybe under a thread that still runs in it."""
    # The binding makes its table of types in the first call that needs it, and two threads in their first call waited
    # for each other for ever (OpenVINO 2026.4, one start in twenty on a busy machine): it is made here
    ov.Type.u8.to_dtype()
    return ov.Core()


def choose_precision(wanted: Literal["auto"] | Precision, version: LoadedVersion, *, bfloat16: bool) -> Precision:
    """`auto` takes bfloat16 where the processor computes in it, else the version's int8, else float32.

    bfloat16 comes first because on such processors it is nearly as fast as int8, and much closer to float32
    (docs/decisions/006-precision.md).

    Args:
        bfloat16: whether the processor has instructions for it.

    Raises:
        EngineUnavailable: the processor or the version lacks what was asked for.
    """
    name = f"{version.manifest.name} {version.manifest.version}"
    if wanted == "auto":
        return "bfloat16" if bfloat16 else "int8" if version.int8 else "float32"
    if wanted == "int8" and not version.int8:
        raise EngineUnavailable(
            f"DERMLENS_PRECISION=int8, but {name} has no int8 graph: use auto, or training.quantize"
        )
    if wanted == "bfloat16" and not bfloat16:
        raise EngineUnavailable("DERMLENS_PRECISION=bfloat16, but this processor does not compute in it: use auto")
    return wanted
