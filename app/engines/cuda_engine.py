"""CUDA: half precision, folded batch norm, and one captured graph for each batch size.

Not run on a GPU yet (docs/decisions/002-no-gpu-here.md). What decides about sizes and padding is in `buckets.py`,
which the suite runs on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engines.base import DeviceLost, DeviceMemory, Output, context_lost
from app.engines.buckets import BUCKETS, Slots, parts, stage
from app.engines.torch_engine import TorchEngine
from app.model.architecture import LesionNet, fold_batch_norm, from_version
from app.model.overlay import Method
from app.model.store import LoadedVersion

GraphPool = Any  # torch's handle, a pair of integers
WARM_UP_RUNS = 3  # before a capture, so that cuDNN has chosen its kernels


class CudaEngine:
    """One version on one GPU with two batches in flight: one is copied while the other is computed."""

    name = "cuda"
    precision = "float16"
    in_flight = 2

    def __init__(self, version: LoadedVersion, *, buckets: Sequence[int] = BUCKETS) -> None:
        self.device = torch.cuda.get_device_name()
        self._version = version
        self._largest = max(buckets)
        model = fold_batch_norm(from_version(version.manifest, version.weights)).requires_grad_(False)
        model = model.to("cuda", torch.float16).to(memory_format=torch.channels_last)
        self._model = model  # the graphs hold the addresses of its weights, and no reference that keeps them
        size = version.manifest.preprocessing.size
        self._slots = Slots(_Slot(model, size=size, buckets=buckets) for _ in range(self.in_flight))

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] -> `Output`, the map float32[B,K,S/16,S/16]; from any thread.

        Raises:
            DeviceLost: the process has to be replaced.
        """
        try:
            with self._slots.take() as slot:
                done = [slot.run(images[part]) for part in parts(len(images), self._largest)]
        except RuntimeError as error:
            if context_lost(error):
                raise DeviceLost(str(error)) from error
            raise
        return Output(*(np.concatenate(arrays) for arrays in zip(*done, strict=True)))

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        """As `TorchEngine.attribute`; its network is built for the call, since few ask for it."""
        return TorchEngine(self._version, device="cuda").attribute(image, method, target=target)

    def memory(self) -> DeviceMemory:
        """Of the whole GPU."""
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(total - free, total)


class _Slot:
    """Pinned and device memory of one batch in flight, and its captured graphs."""

    def __init__(self, model: LesionNet, *, size: int, buckets: Sequence[int]) -> None:
        self._buckets = buckets
        shape = (max(buckets), 3, size, size)
        self._copy, self._compute = torch.cuda.Stream(), torch.cuda.Stream()
        self._copied = torch.cuda.Event()
        self._done = torch.cuda.Event(blocking=True)  # the waiting thread sleeps: decoding needs the core
        self._pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self._staging = self._pinned.numpy()
        self._input = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, list[Tensor]] = {}
        self._answers: dict[int, list[Tensor]] = {}  # pinned, as the outputs
        pool: GraphPool = None
        for bucket in sorted(buckets, reverse=True):  # the largest first, so that the others fit into its memory
            pool = self._capture(model, bucket, pool)

    def _capture(self, model: LesionNet, bucket: int, pool: GraphPool) -> GraphPool:
        def forward() -> list[Tensor]:
            batch = self._input[:bucket].contiguous(memory_format=torch.channels_last)
            return [output.float() for output in model(batch)]

        self._compute.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(self._compute):
            for _ in range(WARM_UP_RUNS):
                forward()
            graph = torch.cuda.CUDAGraph()
            # A version is captured beside the one that serves: what other threads ask of the device must not end it
            with torch.cuda.graph(graph, pool=pool, stream=self._compute, capture_error_mode="thread_local"):
                self._outputs[bucket] = forward()
        self._graphs[bucket] = graph
        self._answers[bucket] = [torch.empty(output.shape, pin_memory=True) for output in self._outputs[bucket]]
        return graph.pool()

    def run(self, images: NDArray[np.uint8]) -> Output:
        """Up to the largest bucket; the outputs are copies."""
        bucket = stage(images, self._staging, self._buckets)
        with torch.inference_mode():
            with torch.cuda.stream(self._copy):
                self._input[:bucket].copy_(self._pinned[:bucket], non_blocking=True)
                self._copied.record()
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(self._copied)
                self._graphs[bucket].replay()
                for answer, output in zip(self._answers[bucket], self._outputs[bucket], strict=True):
                    answer.copy_(output, non_blocking=True)
                self._done.record()
        self._done.synchronize()
        return Output(*(answer[: len(images)].numpy().copy() for answer in self._answers[bucket]))
