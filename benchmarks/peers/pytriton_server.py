"""PyTriton: the real Triton server and its dynamic batcher in front of one Python callable, which decodes and runs."""

import os
import signal
import sys
from typing import Any

import numpy as np
from lesion import MAX_BATCH, load
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

PORT = int(os.environ["PORT"])


def main() -> None:
    decode, run = load()

    @batch  # type: ignore[untyped-decorator]
    def predict(image: Any) -> dict[str, Any]:
        found = run([decode(data) for data in image[:, 0]])
        return {"malignant": np.array(found, np.float32)[:, None]}

    ports = TritonConfig(http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2)
    with Triton(config=ports) as triton:
        triton.bind(
            model_name="lesion",
            infer_func=predict,
            inputs=[Tensor(name="image", dtype=object, shape=(1,))],
            outputs=[Tensor(name="malignant", dtype=np.float32, shape=(1,))],
            config=ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=5_000)),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # leaves `with`, which ends Triton
    main()
