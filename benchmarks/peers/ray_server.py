"""Ray Serve with dynamic batching, one replica on every core, decoding and model off the event loop, no access log."""

import asyncio
import os
import signal
import threading
from typing import Any

import ray
from lesion import MAX_BATCH, load
from ray import serve
from starlette.requests import Request

CORES = os.cpu_count() or 1


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": CORES},  # also the replica's OMP_NUM_THREADS, which is 1 otherwise
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
class Lesion:
    def __init__(self) -> None:
        self.decode, self.run = load()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def predict(self, items: list[Any]) -> list[float]:
        return await asyncio.to_thread(self.run, items)

    async def __call__(self, request: Request) -> dict[str, float]:
        if request.method == "GET":  # ready: /-/healthz says so before the replica has its model
            return {}
        item = await asyncio.to_thread(self.decode, await request.body())
        found: float = await self.predict(item)
        return {"malignant": found}


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    stop = threading.Event()
    ray.init(num_cpus=CORES, include_dashboard=False, object_store_memory=128 << 20)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    http = {"host": "127.0.0.1", "port": int(os.environ["PORT"])}
    serve.start(http_options=http, logging_config={"log_level": "WARNING"})
    serve.run(Lesion.bind(), route_prefix="/predict")  # type: ignore[attr-defined]
    stop.wait()
    serve.shutdown()
    ray.shutdown()
