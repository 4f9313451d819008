"""Torch: half precision on CUDA, float32 on the CPU, where it is the reference for every other engine."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from app.engines.base import Output
from app.model.architecture import from_version
from app.model.store import LoadedVersion


def cuda_available() -> bool:
    return torch.cuda.is_available()


class TorchEngine:
    """One version on one device, channels-last, without autograd."""

    name = "torch"

    def __init__(self, version: LoadedVersion, *, device: Literal["cpu", "cuda"], threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self._torch_device = torch.device(device)
        # Not run on a GPU yet (docs/decisions/002-no-gpu-here.md)
        dtype = torch.float16 if device == "cuda" else torch.float32
        model = from_version(version.manifest, version.weights)
        self._model = model.to(self._torch_device, dtype).to(memory_format=torch.channels_last)

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] -> logits float32[B,K] and cam float32[B,K,S/16,S/16]; bytes cross to the device."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self._torch_device).contiguous(memory_format=torch.channels_last)
            logits, cam = self._model(batch)
            return Output(logits.float().cpu().numpy(), cam.float().cpu().numpy())
