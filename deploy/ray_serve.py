"""The server on a Ray cluster: the same app in every replica, one replica a GPU. docs/ray.md has the rest.

ray start --head --object-spilling-directory=/dev/shm
python deploy/ray_serve.py

Run again, with other settings or on new code, it replaces the replicas one after the other.
"""

import asyncio
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.types import ASGIApp, Message

from app import logs
from app.cli.serve import end_soon
from app.main import create_app
from app.protocol import GuardedProtocol
from app.settings import Settings

NAME = "dermlens"
PORTS = 64  # tried for a replica's own, from the first


class RaySettings(BaseSettings):
    """Beside the server's own settings; docs/ray.md lists these, tests/deploy/test_ray_serve.py holds it to that."""

    model_config = SettingsConfigDict(env_prefix="DERMLENS_RAY_", frozen=True)

    min_replicas: int = Field(1, ge=1, description="Replicas at least.")
    max_replicas: int = Field(8, ge=1, description="Replicas at most; those without a free GPU wait for one.")
    target_ongoing_requests: float = Field(
        16, gt=0, description="Requests a replica should hold; with more on average, replicas are added."
    )
    cpus: float = Field(1, gt=0, description="Processor cores of a replica; without a GPU also its threads.")
    replica_port: int = Field(
        9200, ge=1024, le=65535 - PORTS, description="First of the ports on which the replicas of a node answer alone."
    )


class NotReady(Exception):
    """The app takes no work; the message says why."""


def options(settings: Settings, ours: RaySettings, *, gpu: bool) -> dict[str, Any]:
    """Of the deployment, as `ray.serve.deployment` takes them."""
    return {
        "name": NAME,
        "autoscaling_config": {
            "min_replicas": ours.min_replicas,
            "max_replicas": ours.max_replicas,
            "target_ongoing_requests": ours.target_ongoing_requests,
        },
        # The app refuses what is beyond DERMLENS_MAX_QUEUE images; as many again may have their bodies on the way
        "max_ongoing_requests": 2 * settings.max_queue,
        "max_queued_requests": settings.max_queue,  # in each proxy, while no replica has room or runs
        "backpressure_config": {"retry_after_s": 1},
        "graceful_shutdown_timeout_s": longest_request_s(settings) + 5,
        "health_check_period_s": 2,
        "logging_config": {"enable_access_log": False},  # the app writes its own, with nothing of an upload
        "ray_actor_options": {"num_cpus": ours.cpus, "num_gpus": int(gpu)},
    }


def longest_request_s(settings: Settings) -> float:
    """A body that comes as slowly as it may, and then the longest wait for a result."""
    return (settings.read_timeout_ms + settings.timeout_ms) / 1000


def with_whole_paths(settings: Settings) -> Settings:
    """Relative to where the script runs; replicas run elsewhere."""
    return settings.model_copy(update={name: path.resolve() for name, path in settings if isinstance(path, Path)})


def in_replica(settings: Settings, ours: RaySettings, replica: str) -> Settings:
    """The settings of one replica: no more threads than its cores, and an audit log of its own."""
    changes: dict[str, Any] = {"cpu_threads": settings.cpu_threads or math.ceil(ours.cpus)}
    if settings.audit_log is not None:  # a log has one writer
        changes["audit_log"] = settings.audit_log.with_stem(f"{settings.audit_log.stem}-{replica}")
    return settings.model_copy(update=changes)


def first_free(host: str, first: int) -> socket.socket:
    """A socket that listens on the first free port from `first`.

    Raises:
        OSError: `PORTS` of them are taken, or the address is not this machine's.
    """
    for port in range(first, first + PORTS):
        try:
            return socket.create_server((host, port))
        except OSError as error:
            refused = error
    raise refused


async def check_ready(app: ASGIApp) -> None:
    """Ask the app's own /readyz.

    Raises:
        NotReady: with the reason that it gives.
    """
    said: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        said.append(message)

    await app({"type": "http", "method": "GET", "path": "/readyz", "headers": [], "query_string": b""}, receive, send)
    if said[0]["status"] != 200:
        raise NotReady(json.loads(said[1]["body"])["reason"])


class Replica:
    """One process with one app; what Ray's proxies send goes to the app itself (`serve.ingress`)."""

    app: FastAPI  # set by Ray

    def __init__(self, settings: Settings, ours: RaySettings) -> None:
        self._settings, self._ours = settings, ours

    async def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve

        replica = serve.get_replica_context().replica_id.unique_id
        settings = in_replica(self._settings, self._ours, replica)
        logs.configure(settings.log_level, settings.log_format)
        app = create_app(settings, on_failure=end_soon)
        # A proxy gives /metrics of whichever replica; here it is this one's
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, server_header=False, http=GuardedProtocol, ws="none"
        )
        listening = first_free(settings.host, self._ours.replica_port)
        self._alone = asyncio.create_task(uvicorn.Server(config).serve([listening]))
        return app

    async def check_health(self) -> None:
        """Called by Ray; a replica whose checks fail is replaced."""
        await check_ready(self.app)


def deploy(settings: Settings, ours: RaySettings) -> None:
    """Run the application on the cluster that this process is connected to; returns when its replicas are ready.

    Raises:
        RuntimeError: they do not start.
    """
    import ray
    from ray import serve

    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": settings.host,
            "port": settings.port,
            # Only what a lost node leaves behind comes to this
            "request_timeout_s": longest_request_s(settings) + 10,
        },
    )
    deployment = serve.deployment(serve.ingress()(Replica), **options(settings, ours, gpu=gpu))
    serve.run(deployment.bind(with_whole_paths(settings), ours), name=NAME, route_prefix="/")


def main() -> None:
    try:
        import ray
    except ImportError:
        sys.exit('ray_serve: Ray is not installed here: pip install "ray[serve]>=2.60"')
    try:
        ray.init(address="auto", logging_level="warning")
    except ConnectionError:
        sys.exit("ray_serve: no Ray cluster runs here: ray start --head --object-spilling-directory=/dev/shm")
    settings = Settings()
    try:
        deploy(settings, RaySettings())
    except RuntimeError as error:
        sys.exit(f"ray_serve: the replicas did not start, see `serve status` and Ray's logs: {error}")
    print(f"ray_serve: {NAME} answers on port {settings.port} of every node that has a replica")


if __name__ == "__main__":
    main()
