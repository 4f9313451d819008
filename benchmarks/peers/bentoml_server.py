"""BentoML with adaptive batching, one worker, no access log; latency limit and timeout long enough to drop nothing.

A batchable API takes a list: send one file as the multipart field `images`, read item 0 of the answer.
"""

import os
from pathlib import Path
from typing import Any

import bentoml
from lesion import MAX_BATCH, load


@bentoml.service(
    workers=1,
    traffic={"timeout": 120},
    http={"port": int(os.environ["PORT"])},
    logging={"access": {"enabled": False}},
)
class Lesion:
    def __init__(self) -> None:
        self.decode, self.run = load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def predict(self, images: list[Path]) -> list[dict[str, Any]]:
        found = self.run([self.decode(image.read_bytes()) for image in images])
        return [{"malignant": probability} for probability in found]


if __name__ == "__main__":
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    from bentoml_server import Lesion as Service  # the worker imports it again, by a name that `__main__` lacks

    Service.serve_http()  # type: ignore[attr-defined]
