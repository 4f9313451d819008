"""Torch in float32: the reference for every other engine, and what explains by gradients and by many passes."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engines.base import Output
from app.model.architecture import from_version
from app.model.overlay import Method
from app.model.store import LoadedVersion

STEPS = 32  # of integrated gradients: the sum is within 0.04 logits on three real images, where 16 missed by 0.5
AT_ONCE = 4  # steps or occluded copies in one pass: bounds memory, the process peaks at 1.3 GB on the CPU
WINDOW, STRIDE = 32, 16  # pixels; every 16×16 block is then covered by whole windows alone


def cuda_available() -> bool:
    return torch.cuda.is_available()


def cuda_names() -> list[str]:
    """The CUDA devices, in their order."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


class TorchEngine:
    """One version on one device, channels-last, without autograd."""

    name = "torch"
    precision = "float32"
    in_flight = 1

    def __init__(self, version: LoadedVersion, *, device: Literal["cpu", "cuda"], threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self._torch_device = torch.device(device)
        # Without requires_grad a backward pass of `attribute` keeps nothing for the weights
        model = from_version(version.manifest, version.weights).requires_grad_(False)
        self._model = model.to(self._torch_device).to(memory_format=torch.channels_last)

    def run(self, images: NDArray[np.uint8]) -> Output:
        """uint8[B,3,S,S] -> `Output`, the map float32[B,K,S/16,S/16]; bytes cross to the device."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self._torch_device).contiguous(memory_format=torch.channels_last)
            return Output(*(output.cpu().numpy() for output in self._model(batch)))

    def attribute(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]:
        """uint8[3,S,S] -> signed map of the evidence for class `target`, in the CAM's target and logits.

        `integrated-gradients` (arXiv 1703.01365): float32[S/8,S/8], each cell the sum of its pixels and channels, so
        that the whole map sums to what the image has above its baseline. `occlusion` (arXiv 1311.2901):
        float32[S/16,S/16], each cell the mean loss over the windows that cover it. `gradcam`: float32[S/16,S/16].

        The baseline is the image's mean colour: nothing of its structure is left, and unlike black it is no
        colour that the network has never seen on skin.
        """
        if method == "gradcam":
            cam: NDArray[np.float32] = self.run(image[None]).cam[0, target]
            return cam
        from captum.attr import IntegratedGradients, Occlusion  # seconds to import, for two methods that few ask for

        pixels = torch.from_numpy(image[None]).to(self._torch_device, torch.float32)
        baseline = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)

        def margin(images: Tensor) -> Tensor:
            """`logit_c − mean of the other logits` [B] of float[B,3,S,S] in 0..255, the target of the CAM too."""
            logits: Tensor = self._model(images.contiguous(memory_format=torch.channels_last)).logits
            mine = logits[:, target]
            return mine - (logits.sum(dim=1) - mine) / (logits.shape[1] - 1)

        if method == "occlusion":
            window, stride = (3, WINDOW, WINDOW), (3, STRIDE, STRIDE)
            with torch.no_grad():
                raw = Occlusion(margin).attribute(
                    pixels, window, stride, baselines=baseline, perturbations_per_eval=AT_ONCE
                )
            cells = torch.nn.functional.avg_pool2d(raw[:, :1], STRIDE)
        else:
            raw = IntegratedGradients(margin).attribute(pixels, baseline, n_steps=STEPS, internal_batch_size=AT_ONCE)
            cells = torch.nn.functional.avg_pool2d(raw.sum(dim=1, keepdim=True), 8) * 64
        found: NDArray[np.float32] = cells[0, 0].float().cpu().numpy()
        return found
