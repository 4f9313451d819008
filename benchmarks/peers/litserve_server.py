"""LitServe with its documented settings for throughput: batching and the fast queue."""

import os
from collections.abc import Sequence
from typing import Any

import litserve
from fastapi import Request
from lesion import MAX_BATCH, load


class Lesion(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        self.decode, self.run = load()

    def decode_request(self, request: Request) -> Any:
        return self.decode(request["file"].file.read())  # by now LitServe has parsed the form

    def batch(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def predict(self, x: Sequence[Any]) -> list[float]:
        return self.run(x)

    def unbatch(self, output: list[float]) -> list[float]:
        return output

    def encode_response(self, output: float) -> dict[str, float]:
        return {"malignant": output}


if __name__ == "__main__":
    api = Lesion(max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True, timeout=120)
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
