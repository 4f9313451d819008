"""Two Ray nodes, a replica on each, and what a client notices when replicas, nodes and versions go.

.venv/bin/python benchmarks/ray_cluster.py

Starts a cluster of two nodes on this machine (one core each, so one thread a replica), runs `deploy/ray_serve.py`'s
application on it, and loads it with clients that try again as docs/ray.md asks them to. Ray lives in a virtual
environment of its own, .bench/ray, made at the first call. Exit code 1 where a bar is missed.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import io
import itertools
import os
import re
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import ROOT, environment, machine
from load import Connection, Target, closed_loop, http, raw
from overload import LOST, Bar, save, spread_ms, tell
from soak import two_versions

from app.model import store
from app.settings import Settings
from training.drawn import draw_lesion

MODEL = "asff-resnet50"
CLIENTS = 16
GIVE_UP_S = 60  # of one request, all its tries together
SILENT_S = 30  # of one try
AGAIN_S = 0.2  # after an answer that does not say when
OBJECTS = 100 << 20  # bytes of a node's object store
REPLICA_PORT = 19200
READY_S = 120  # longest wait for anything to be there
RAY_ENVIRONMENT = {  # the waits: seven processes of a node start on cores that others use too
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": str(1000 * READY_S),
    "RAY_raylet_start_wait_time_s": str(READY_S),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(READY_S),
    "RAY_worker_niceness": "0",  # 15 otherwise, so that whatever else runs here goes first
}


def wait_before_retry(status: int, head: bytes) -> float | None:
    """Seconds until the next try; None where the answer is final.

    A proxy that loses its replica answers 500, 408 or 503 as plain text; the app's own errors are JSON, and final but
    for 503 and 429. Trying again is safe: a prediction changes nothing.

    Args:
        head: in lower case, as of `load.Connection`.
    """
    if status == LOST:
        return AGAIN_S
    if status in (429, 503):
        found = re.search(rb"\r\nretry-after: (\d+)", head)
        return float(found[1]) if found else AGAIN_S
    return AGAIN_S if status in (408, 500) and b"\r\ncontent-type: text/plain" in head else None


@dataclass
class Tally:
    """What clients met while something happened."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # final answers other than 200, or given up
    retried: Counter[str] = field(default_factory=Counter)  # tries that were not the last, by status
    seconds: list[float] = field(default_factory=list)  # from a request's first try to its answer
    versions: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        return {
            "answered": self.answered,
            "failed": dict(self.failed),
            "retried": dict(self.retried),
            "ms": {key: round(value, 1) for key, value in spread_ms(self.seconds).items()},
            "versions": dict(self.versions),
        }


async def ask(target: Target, connection: Connection | None, request: bytes, tally: Tally) -> Connection | None:
    """One request, tried until its answer is final; the connection, where it can be used again."""
    began = time.monotonic()
    while True:
        status, head = LOST, b""
        try:
            async with asyncio.timeout(SILENT_S):
                if connection is None or not connection.open:
                    connection = await target.connect()
                status = await connection.send(request)
            head = connection.head
        except OSError:  # TimeoutError is one
            if connection is not None:
                connection.close()
            connection = None
        if connection is not None and b"\r\nconnection: close" in head:
            connection.close()
        pause_s = wait_before_retry(status, head)
        name = str(status) if status else "connection"
        if status == 200:
            tally.answered += 1
            tally.seconds.append(time.monotonic() - began)
            if found := re.search(rb"\r\nx-model-version: (\S+)", head):
                tally.versions[found[1].decode()] += 1
            return connection
        if pause_s is None or time.monotonic() + pause_s - began > GIVE_UP_S:
            tally.failed[name] += 1
            return connection
        tally.retried[name] += 1
        await asyncio.sleep(pause_s)


@contextlib.asynccontextmanager
async def under_load(target: Target, clients: int) -> AsyncIterator[Tally]:
    """Clients that ask without a pause, before, while and after the block runs."""
    tally, stop, turn = Tally(), asyncio.Event(), itertools.cycle(target.requests)

    async def client() -> None:
        connection: Connection | None = None
        while not stop.is_set():
            connection = await ask(target, connection, next(turn), tally)
        if connection is not None:
            connection.close()

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(3)
    try:
        yield tally
        await asyncio.sleep(3)
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def below(pid: int) -> list[int]:
    """A process and all that it started, itself last."""
    family, found = parents(), [pid]
    for parent in found:
        found += [child for child, its_parent in family.items() if its_parent == parent]
    return found[::-1]


class TwoNodes:
    """A head and a worker, each with one core, on this machine; the proxies of both share one port."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._spill = Path(tempfile.mkdtemp(prefix="dermlens-ray-", dir="/dev/shm"))
        self._node_args = {
            "num_cpus": 1,
            "object_store_memory": OBJECTS,
            "object_spilling_directory": str(self._spill),
            "no_monitor": True,  # of the autoscaler of nodes, and the next of logs: two processes fewer
            "include_log_monitor": False,
        }
        head_args = self._node_args | agent_ports() | {"include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head_args, shutdown_at_exit=False)
        self.add_worker()
        ray.init(address=self._cluster.address, logging_level="error", log_to_driver=False)

    def add_worker(self) -> None:
        self.worker: Any = self._cluster.add_node(**self._node_args | agent_ports())

    def replicas(self, node: Any = None) -> set[int]:
        """Process ids of the replicas, of one node or of both."""
        found = set[int]()
        for n in [node] if node else [self._cluster.head_node, self.worker]:
            for pid in below(raylet(n)):
                with contextlib.suppress(OSError):
                    if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"ray::ServeReplica:"):
                        found.add(pid)
        return found

    def kill_worker(self) -> None:
        """As a power cut: every process of the node, at once."""
        for pid in below(raylet(self.worker)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(self.worker, allow_graceful=False)

    def spilled(self) -> int:
        """Files that the object stores wrote beside their memory."""
        return sum(path.is_file() for path in self._spill.rglob("*"))

    def stop(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()
        for path in sorted(self._spill.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self._spill.rmdir()


def agent_ports() -> dict[str, int]:
    """For a new node: one that has to choose them itself dies where that takes longer than 15 s."""
    agents = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return {agent: free_port() for agent in agents}


def raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def running() -> int:
    """Replicas that Ray sends requests to."""
    from ray import serve

    deployments = [d for a in serve.status().applications.values() for d in a.deployments.values()]
    return sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments)


def versions_alone() -> list[str]:
    """What each replica serves, from its own /metrics."""
    found = []
    for port in range(REPLICA_PORT, REPLICA_PORT + 6):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as got:
            info = re.search(r"^dermlens_model_info\{.*version=\"([^\"]+)\"", got.read().decode(), re.MULTILINE)
            found.append(info[1] if info else "none")
    return found


async def until(what: str, holds: Callable[[], bool]) -> float:
    """Seconds until it holds.

    Raises:
        RuntimeError: it did not within `READY_S`.
    """
    began = time.monotonic()
    while time.monotonic() - began < READY_S:
        if await asyncio.to_thread(holds):
            return round(time.monotonic() - began, 1)
        await asyncio.sleep(0.2)
    raise RuntimeError(f"not within {READY_S} s: {what}")


def requests() -> list[bytes]:
    """Sixteen drawn lesions, 224×224 JPEG."""
    made = []
    for seed in range(16):
        buffer = io.BytesIO()
        draw_lesion(seed % 2, seed).save(buffer, "JPEG", quality=92)
        headers, body = raw(buffer.getvalue())
        made.append(http("POST", "/predict", headers={"host": "127.0.0.1"} | headers, body=body))
    return made


async def prove(nodes: TwoNodes, settings: Settings, root: Path, *, seconds: float) -> dict[str, Any]:
    """Every phase in turn, by its name."""
    from ray_serve import RaySettings, deploy  # found by the path that `main` sets

    target, found = Target("127.0.0.1", settings.port, requests()), dict[str, Any]()

    def done(phase: str, tally: Tally, **more: Any) -> None:
        found[phase] = tally.summary() | more
        print(f"{phase}: {found[phase]}", flush=True)

    async def throughput() -> dict[str, object]:
        await closed_loop(target, clients=CLIENTS, seconds=2)  # warms
        return (await closed_loop(target, clients=CLIENTS, seconds=seconds)).summary()

    async def start(settings: Settings, **ours: Any) -> None:
        await asyncio.to_thread(deploy, settings, RaySettings(replica_port=REPLICA_PORT, **ours))

    await start(settings, max_replicas=1)
    found["one replica"] = await throughput()
    print(f"one replica: {found['one replica']}", flush=True)

    await start(settings, max_replicas=2, target_ongoing_requests=4)
    async with under_load(target, CLIENTS) as tally:
        took_s = await until("a second replica", lambda: running() == 2)
    done("scaled up by its queue", tally, until_two_replicas_s=took_s)
    spread = [len(nodes.replicas(node)) for node in (None, nodes.worker)]
    if spread != [2, 1]:
        raise RuntimeError(f"the replicas are not one on each node: {spread}")
    found["two replicas"] = await throughput()
    print(f"two replicas: {found['two replicas']}", flush=True)

    async with under_load(target, CLIENTS) as tally:
        before = nodes.replicas()
        os.kill(min(before), signal.SIGKILL)
        took_s = await until("the replica again", lambda: len(nodes.replicas() - before) == 1 and running() == 2)
    done("a replica killed", tally, until_two_replicas_s=took_s)

    async with under_load(target, CLIENTS) as tally:
        await asyncio.to_thread(nodes.kill_worker)
        await until("one replica fewer", lambda: running() == 1)
        await asyncio.sleep(5)
        await asyncio.to_thread(nodes.add_worker)
        took_s = await until("a replica on the new node", lambda: running() == 2)
    done("a node killed, another added", tally, until_two_replicas_s=took_s)

    current, other = store.current(root, MODEL), store.versions(root, MODEL)[-1]
    async with under_load(target, CLIENTS) as tally:
        await asyncio.to_thread(store.promote, root, MODEL, other)
        took_s = await until("both follow", lambda: versions_alone() == [other] * 2)
    done("a version promoted", tally, until_both_follow_s=took_s)

    async with under_load(target, CLIENTS) as tally:
        before = nodes.replicas()
        pinned = settings.model_copy(update={"model_version": current})
        await start(pinned, min_replicas=2, max_replicas=2)
        took_s = await until("both are new", lambda: not before & nodes.replicas() and running() == 2)
    done("deployed again, with the version before", tally, versions_after=await asyncio.to_thread(versions_alone))
    return found | {"files spilled": nodes.spilled()}


PLANNED = ("a version promoted", "deployed again, with the version before")
UNPLANNED = ("scaled up by its queue", "a replica killed", "a node killed, another added")


def bars_of(found: dict[str, Any], *, versions: Sequence[str]) -> list[Bar]:
    """What has to hold; throughput is told, and has no bar on a machine whose cores all parts share."""
    bars = []
    for phase in (*UNPLANNED, *PLANNED):
        bars.append(Bar(f"{phase}: requests failed", sum(found[phase]["failed"].values()), 0))
        bars.append(Bar(f"{phase}: requests answered", found[phase]["answered"], 50, at_least=True))
    bars += [Bar(f"{phase}: tries that failed", sum(found[phase]["retried"].values()), 0) for phase in PLANNED]
    after = found[PLANNED[1]]["versions_after"]
    return [
        *bars,
        Bar("replicas that serve the version before, in the end", after.count(versions[0]), 2, at_least=True),
        Bar("files that the object stores spilled", found["files spilled"], 0),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    try:
        yield nodes
    finally:
        nodes.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement of throughput")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ray_cluster.json")
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "deploy", "benchmarks"))
        python = environment("ray")
        os.execve(python, [str(python), *sys.argv], os.environ | RAY_ENVIRONMENT | {"PYTHONPATH": paths})  # noqa: S606
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the nodes too
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1}", flush=True)
        with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
            root = Path(folder)
            two_versions(ROOT / "model_store", root)
            settings = Settings(model_store=root, port=free_port(), reload_ms=500, decode_threads=2)
            rounds.append(asyncio.run(prove(nodes, settings, root, seconds=options.seconds)))
            versions = store.versions(root, MODEL)
    bars = [bar for found in rounds for bar in bars_of(found, versions=versions)]
    result = {
        "machine": machine(),
        "clients": CLIENTS,
        "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
        "rounds": rounds,
    }
    save(result, options.out)
    print(f"{result['machine']}\n{options.out}")
    sys.exit(tell(bars))


if __name__ == "__main__":
    main()
