"""JPEG decoding on the GPU (nvJPEG through torchvision), for hosts whose processors are the bottleneck.

Not run on a GPU yet (docs/decisions/002-no-gpu-here.md). It decodes at full size and resizes with antialiasing, where
Pillow's path decodes scaled: the two differ by a level or two. torchvision 0.29 deprecates its decoders in favour of
TorchCodec's, which this would move to.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

from app.engines.base import EngineUnavailable


class NvJpeg:
    """A `preprocess.JpegDecoder` on a CUDA device; called from several threads."""

    def __init__(self, device: str = "cuda") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailable("DERMLENS_DECODER=nvjpeg, but torch sees no CUDA device: use pillow")
        self._device = device

    def __call__(self, data: bytes, size: int) -> NDArray[np.uint8]:
        """A whole JPEG file -> uint8[3,size,size] RGB, its EXIF turn not undone.

        Raises:
            ValueError: the file is damaged or of a kind that nvJPEG cannot decode, or the GPU has no memory for it.
        """
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            image = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
            pixels: NDArray[np.uint8] = transforms.resize(image, [size, size], antialias=True).cpu().numpy()
        except RuntimeError as error:  # a lost device too: the next forward pass will meet it
            raise ValueError("not decoded") from error
        return pixels
