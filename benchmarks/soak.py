"""Half an hour of everything at once against one `dermlens serve`: does it leak, does it fail where it should not?

make soak
.venv/bin/python benchmarks/soak.py --minutes 4

Predictions, batches and explanations; damaged, oversize and malformed uploads; clients that leave; deadlines that
cannot be met; bursts that fill the queue; and a promoted or rolled-back version every 20 seconds, in a store of its
own. Which request comes when follows from the seed. Traffic pauses once after the warm-up, and at the end: what is
open then is compared. Exit code 1 where a bar is missed.
"""

import argparse
import asyncio
import io
import itertools
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop
from compare import ROOT, machine
from load import BOUNDARY, Connection, Target, http
from overload import LOST, Bar, Served, Vitals, save, serving, stop, tell, vitals
from PIL import Image

from app.model import store
from training.drawn import draw_lesion

NAME = "asff-resnet50"
WORKERS = 5
BURST = 160  # requests at once
SETTINGS = {  # a queue that a burst fills and the workers alone do not, and a body limit that is quickly passed
    "DERMLENS_MAX_QUEUE": "64",
    "DERMLENS_MAX_UPLOAD_BYTES": "2000000",
    "DERMLENS_RELOAD_MS": "1000",
}
HUNG_S = 60  # no answer by then
KEPT_SURPRISES = 20
HOST = {"host": "127.0.0.1"}
JPEG = HOST | {"content-type": "image/jpeg"}


@dataclass(frozen=True)
class Action:
    """One kind of request, and what may be answered to it beside a 503 in a burst."""

    name: str
    request: bytes
    expected: frozenset[int] = frozenset({200})
    weight: int = 1
    leaves: str = ""  # `upload` or `waiting`: the client is gone before the answer

    @property
    def hurried(self) -> bool:
        return 504 in self.expected


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=92)
    return buffer.getvalue()


def form(name: str, files: Sequence[bytes]) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
    return b"".join(head + file + b"\r\n" for file in files) + f"--{BOUNDARY}--\r\n".encode()


def catalogue() -> list[Action]:
    """Every kind of request of the soak."""
    jpeg, other = (encode(draw_lesion(kind, 1, size=(320, 240))) for kind in (0, 1))
    png = encode(draw_lesion(1, 2, size=(320, 240)), "PNG")
    large = encode(draw_lesion(1, 3, size=(600, 450)).resize((3000, 2250)))
    multipart = HOST | {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    endless = (
        b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\ntransfer-encoding: chunked\r\n\r\n"
    )

    def post(name: str, path: str, body: bytes, *expected: int, weight: int = 1, **more: Any) -> Action:
        headers = more.pop("headers", JPEG)
        request = http("POST", path, headers=headers, body=body)
        return Action(name, request, frozenset(expected or (200,)), weight, **more)

    def get(path: str, *expected: int) -> Action:
        return Action(path, http("GET", path, headers=HOST), frozenset(expected or (200,)))

    return [
        post("jpeg", "/predict", jpeg, weight=8),
        post("png", "/predict", png, weight=4),
        post("large jpeg", "/predict", large, weight=2),
        post("form", "/predict", form("file", [other]), weight=4, headers=multipart),
        post("background", "/predict", jpeg, weight=2, headers=JPEG | {"x-priority": "batch"}),
        post("batch", "/predict/batch", form("files", [jpeg, png, jpeg[:900], other]), weight=3, headers=multipart),
        *(
            post(f"explain {style}", f"/explain?style={style}&alpha=0.4", jpeg, weight=2)
            for style in ("overlay", "heatmap", "side-by-side")
        ),
        post("explain json", "/explain?target=benign", png, weight=2, headers=JPEG | {"accept": "application/json"}),
        post("explain large", "/explain?target=malignant", large),
        get("/models"),
        get("/metrics"),
        get("/readyz"),
        get("/livez"),
        get("/openapi.json"),
        post("truncated", "/predict", jpeg[: len(jpeg) // 2], 400),
        post("not an image", "/predict", b"hello" * 100, 400, 415),
        post("text", "/predict", b"hello", 415, headers=HOST | {"content-type": "text/plain"}),
        post("oversize", "/predict", bytes(2_100_000), 413),
        Action("oversize, chunked", endless + chunk * 3 + b"0\r\n\r\n", frozenset({413})),
        post("unknown style", "/explain?style=none", jpeg, 422),
        post("unknown operating point", "/predict?operating_point=none", jpeg, 422),
        post("alpha of 7", "/explain?alpha=7", jpeg, 422),
        post("no boundary", "/predict", jpeg, 400, headers=HOST | {"content-type": "multipart/form-data"}),
        post("broken form", "/predict", form("file", [jpeg])[30:], 400, headers=multipart),
        post("other field", "/predict", form("picture", [jpeg]), 400, headers=multipart),
        get("/nowhere", 404),
        get("/predict", 405),
        post("leaves in upload", "/predict", large, weight=2, leaves="upload"),
        post("leaves waiting", "/predict", jpeg, weight=2, leaves="waiting"),
        post("leaves form", "/predict", form("file", [large]), headers=multipart, leaves="upload"),
        post("1 ms", "/predict", jpeg, 200, 504, weight=2, headers=JPEG | {"x-timeout-ms": "1"}),
        post("5 ms, large", "/explain", large, 200, 504, headers=JPEG | {"x-timeout-ms": "5"}),
    ]


def mix(actions: Sequence[Action], seed: str) -> Iterator[Action]:
    """Actions by weight, for ever, the same for the same seed."""
    source, weights = random.Random(seed), [action.weight for action in actions]  # noqa: S311 - a schedule
    while True:
        yield from source.choices(actions, weights, k=64)


def explained(action: Action, status: int, *, retry_after: bool, burst: bool) -> bool:
    """Whether this answer is one that this request may get, now that a burst is or is not under way.

    A deadline that cannot be met may be told at once, with 503, or when it has passed.
    """
    if status == 503:
        return retry_after and (burst or action.hurried)
    return status in action.expected


class Sample(NamedTuple):
    """Taken every few seconds; counts run on from the start."""

    at: float  # seconds since the start
    vitals: Vitals
    queue: float
    statuses: Mapping[str, int]
    client_mb: float


@dataclass
class Tally:
    """What happened so far; nothing here grows with the number of requests, but for a sample now and then."""

    statuses: Counter[str] = field(default_factory=Counter)  # "lost" and "left" among them
    by_action: Counter[str] = field(default_factory=Counter)  # "name status"
    bad_5xx: int = 0
    other_surprises: int = 0
    surprises: list[str] = field(default_factory=list)  # the first few, in words
    samples: list[Sample] = field(default_factory=list)
    promoted: int = 0
    followed: int = 0  # promotions that the answers show
    versions: set[str] = field(default_factory=set)  # that answered since the last promotion

    def count(self, action: Action, status: int, head: bytes, *, burst: bool) -> None:
        name = str(status) if status else "lost"
        self.statuses[name] += 1
        self.by_action[f"{action.name}: {name}"] += 1
        if found := re.search(rb"\r\nx-model-version: (\S+)", head):
            self.versions.add(found[1].decode())
        retry_after = b"\r\nretry-after:" in head
        if explained(action, status, retry_after=retry_after, burst=burst):
            return
        if status >= 500:
            self.bad_5xx += 1
        else:
            self.other_surprises += 1
        if len(self.surprises) < KEPT_SURPRISES:
            self.surprises.append(f"{action.name}: {name}{', retry-after' * retry_after}{', in a burst' * burst}")


class Soak:
    """The traffic, and what it finds."""

    def __init__(self, served: Served, root: Path, *, seed: int, reload_s: float, burst_s: float) -> None:
        self.tally = Tally()
        self._served = served
        self._root = root
        self._target = Target("127.0.0.1", served.port, ())
        self._actions = catalogue()
        self._seed = seed
        self._reload_s = reload_s
        self._burst_s = burst_s
        self._versions = itertools.cycle(reversed(store.versions(root, NAME)))
        self._burst_ended = 0.0  # on the clock of `time.monotonic`; infinity while one is under way
        self._began = time.monotonic()

    async def traffic(self, seconds: float, *, phase: str) -> None:
        """Everything at once for so long; nothing of it is under way when it returns."""
        end = time.monotonic() + seconds
        workers = (self._work(mix(self._actions, f"{self._seed} {phase} {n}"), end) for n in range(WORKERS))
        await asyncio.gather(*workers, self._burst(end), self._reload(end))

    async def _work(self, actions: Iterator[Action], end: float) -> None:
        connection: Connection | None = None
        while time.monotonic() < end:
            action = next(actions)
            if action.leaves:
                await self._leave(action)
            else:
                connection = await self._ask(action, connection)
            await asyncio.sleep(0.01)
        if connection is not None:
            connection.close()

    async def _ask(self, action: Action, connection: Connection | None) -> Connection | None:
        """Send, judge the answer, and give the connection back where it is still good."""
        sent, status, head = time.monotonic(), LOST, b""
        try:
            async with asyncio.timeout(HUNG_S):
                if connection is None or not connection.open:
                    connection = await self._target.connect()
                status, head = await connection.send(action.request), connection.head
        except (OSError, TimeoutError):
            if connection is not None:
                connection.close()
        self.tally.count(action, status, head, burst=sent <= self._burst_ended)
        if status == LOST or connection is None or b"\r\nconnection: close" in head:
            return None
        return connection

    async def _leave(self, action: Action) -> None:
        upload = action.leaves == "upload"
        with suppress(OSError):
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(asyncio.Protocol, self._target.host, self._target.port)
            transport.write(action.request[: len(action.request) // 2] if upload else action.request)
            await asyncio.sleep(0.02)  # some are queued by then, some are decoded, some are on the device
            transport.abort()
        self.tally.statuses["left"] += 1
        self.tally.by_action[f"{action.name}: left"] += 1

    async def _burst(self, end: float) -> None:
        predict = self._actions[0]

        async def one() -> None:
            connection = await self._ask(predict, None)
            if connection is not None:
                connection.close()

        while time.monotonic() + self._burst_s < end:
            await asyncio.sleep(self._burst_s)
            self._burst_ended = float("inf")
            await asyncio.gather(*(one() for _ in range(BURST)))
            self._burst_ended = time.monotonic()

    async def _reload(self, end: float) -> None:
        while time.monotonic() + self._reload_s < end:
            version = next(self._versions)
            await promote(self._root, version)
            self.tally.promoted += 1
            self.tally.versions.clear()
            await asyncio.sleep(self._reload_s)
            self.tally.followed += version in self.tally.versions

    async def sample(self, every_s: float) -> None:
        """Take a sample every so often, until cancelled, and tell of it once a minute."""
        told = 0.0
        while True:
            now = time.monotonic() - self._began
            found = await asyncio.to_thread(vitals, self._served.process.pid)
            depth = await self._queue_depth()
            client_mb = vitals_of_self()
            self.tally.samples.append(Sample(now, found, depth, dict(self.tally.statuses), client_mb))
            if now - told >= 60:
                told = now
                statuses = dict(self.tally.statuses)
                print(f"{now / 60:5.1f} min  RSS {found.rss_mb:.0f} MB  fds {found.fds}  threads {found.threads}  "
                      f"client {client_mb:.0f} MB  {statuses}", flush=True)  # fmt: skip
            await asyncio.sleep(every_s)

    async def _queue_depth(self) -> float:
        text = await self._get("/metrics")
        found = re.search(r"^dermlens_queue_depth (\S+)", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    async def _get(self, path: str) -> str:
        """The answer as text; empty where there is none. It is not counted as traffic."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(HUNG_S):
                reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
                writer.write(http("GET", path, headers=HOST | {"connection": "close"}))
                answer = (await reader.read()).decode()
                writer.close()
                return answer
        return ""

    async def rest(self, seconds: float) -> Vitals:
        """Fewest descriptors and threads within so many seconds without traffic.

        /models is answered in a worker thread, and a worker thread that begins work ends those idle for 10 seconds.
        """
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end:
            await self._get("/models")
            found.append(await asyncio.to_thread(vitals, self._served.process.pid))
            await asyncio.sleep(0.5)
        fewest = found[-1]._replace(fds=min(v.fds for v in found), threads=min(v.threads for v in found))
        print(f"at rest: RSS {fewest.rss_mb:.0f} MB  fds {fewest.fds}  threads {fewest.threads}", flush=True)
        return fewest


async def promote(root: Path, version: str) -> None:
    """In a process of its own, as an operator does it: it reads the whole version, and this process stays small."""
    program = (
        "import pathlib, sys; from app.model import store; store.promote(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    )
    command = (sys.executable, "-c", program, str(root), NAME, version)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    if await process.wait():
        raise RuntimeError(f"version {version} could not be promoted")


def vitals_of_self() -> float:
    """Resident megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def two_versions(source: Path, root: Path) -> None:
    """A store whose current version is that of `source`, with a copy of it under the next number."""
    version = store.current(source, NAME)
    manifest = store.verify(source, NAME, version)
    files = {file: (source / NAME / version / file).read_bytes() for file in manifest.files}
    for number in (int(version), int(version) + 1):
        store.publish(root, manifest.model_copy(update={"version": str(number)}), files)
    store.promote(root, NAME, version)


@dataclass(frozen=True)
class Outcome:
    """All that the bars are set on."""

    tally: Tally
    warm_until: float  # seconds since the start at which the second part of the traffic began
    traffic_until: float
    rested: Sequence[Vitals]  # after the warm-up and at the end
    exit_code: int


def growth(samples: Sequence[Sample], start: float, end: float) -> float:
    """Memory of the last minute over that of the first, less one; a sixth of the time where that is shorter.

    The lower quartile of each: while a version is loaded there are two in memory, and that is no leak. NaN where
    either has no sample.
    """
    width = min(60.0, (end - start) / 6)
    first = [s.vitals.rss_mb for s in samples if start <= s.at <= start + width]
    last = [s.vitals.rss_mb for s in samples if end - width <= s.at <= end]
    return float(np.percentile(last, 25) / np.percentile(first, 25)) - 1 if first and last else float("nan")


def bars_of(outcome: Outcome) -> list[Bar]:
    tally, (warm, end) = outcome.tally, outcome.rested
    grown = growth(tally.samples, outcome.warm_until, outcome.traffic_until)
    return [
        Bar("memory growth after the warm-up, %", 100 * grown, 2),
        Bar("memory growth from one rest to the other, %", 100 * (end.rss_mb / warm.rss_mb - 1), 2),
        Bar("file descriptors more than after the warm-up, at rest", end.fds - warm.fds, 0),
        Bar("threads more than after the warm-up, at rest", end.threads - warm.threads, 0),
        Bar("unexplained 5xx", tally.bad_5xx, 0),
        Bar("other answers that were not due, lost ones among them", tally.other_surprises, 0),
        Bar("requests answered with 200", tally.statuses["200"], 1, at_least=True),
        Bar("requests refused in bursts (503)", tally.statuses["503"], 1, at_least=True),
        Bar("deadlines told (504)", tally.statuses["504"], 1, at_least=True),
        Bar("promotions that the server did not follow", tally.promoted - tally.followed, 0),
        Bar("exit code after SIGTERM", abs(outcome.exit_code), 0),
    ]


async def run(
    served: Served,
    root: Path,
    *,
    seconds: float,
    warm_s: float,
    rest_s: float,
    every_s: float,
    seed: int,
    **pace: float,
) -> Outcome:
    """The whole soak, up to and with the server's end."""
    soak = Soak(served, root, seed=seed, reload_s=pace["reload_s"], burst_s=pace["burst_s"])
    began = time.monotonic()
    sampler = asyncio.create_task(soak.sample(every_s))
    try:
        await soak.traffic(warm_s, phase="warm-up")
        rested = [await soak.rest(rest_s)]
        warm_until = time.monotonic() - began
        await soak.traffic(seconds - warm_s, phase="soak")
        traffic_until = time.monotonic() - began
        rested.append(await soak.rest(rest_s))
    finally:
        sampler.cancel()
    exit_code = await asyncio.to_thread(stop, served.process)
    return Outcome(soak.tally, warm_until, traffic_until, rested, exit_code)


def plot(outcome: Outcome, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(9, 10), sharex=True, layout="constrained")
    samples = outcome.tally.samples
    minutes = [s.at / 60 for s in samples]
    for label, values in (
        ("server, resident", [s.vitals.rss_mb for s in samples]),
        ("server, proportional (PSS)", [s.vitals.pss_mb for s in samples]),
        ("this client, resident", [s.client_mb for s in samples]),
    ):
        axes[0].plot(minutes, values, label=label)
    axes[0].set_ylabel("MB")
    axes[1].plot(minutes, [s.vitals.fds for s in samples], label="file descriptors")
    axes[1].plot(minutes, [s.vitals.threads for s in samples], label="threads")
    axes[2].plot(minutes, [s.queue for s in samples], label="waiting for the device")
    for status in sorted(outcome.tally.statuses):
        rates = [
            (b.statuses.get(status, 0) - a.statuses.get(status, 0)) / (b.at - a.at)
            for a, b in itertools.pairwise(samples)
        ]
        axes[3].plot(minutes[1:], rates, label=status, linewidth=0.8)
    axes[3].set_ylabel("a second")
    axes[3].set_yscale("symlog")
    axes[3].set_xlabel("minutes; dotted: the warm-up has ended")
    for axis in axes:
        axis.axvline(outcome.warm_until / 60, color="black", linewidth=0.6, linestyle=":")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, ncols=6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of traffic, the warm-up among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--store", type=Path, default=ROOT / "model_store", help="its current version is copied")
    parser.add_argument(
        "--rest", type=float, default=20, help="seconds of each pause in which the leaks are looked for"
    )
    parser.add_argument("--reload", type=float, default=20, help="seconds between promotions")
    parser.add_argument("--burst", type=float, default=15, help="seconds between bursts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        two_versions(options.store, root)
        with serving(SETTINGS | {"DERMLENS_MODEL_STORE": str(root)}) as served:
            outcome = uvloop.run(
                run(
                    served,
                    root,
                    seconds=seconds,
                    warm_s=min(300.0, seconds / 3),
                    rest_s=options.rest,
                    every_s=options.every,
                    seed=options.seed,
                    reload_s=options.reload,
                    burst_s=options.burst,
                )
            )
            log = served.log.read_text()
    bars, tally = bars_of(outcome), outcome.tally
    result = {
        "machine": machine(),
        "minutes": options.minutes,
        "seed": options.seed,
        "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
        "promoted": tally.promoted,
        "statuses": tally.statuses,
        "by action": dict(sorted(tally.by_action.items())),
        "surprises": tally.surprises,
        "at rest": [found._asdict() for found in outcome.rested],
        "warm_until_s": outcome.warm_until,
        "samples": [s._asdict() | {"vitals": s.vitals._asdict()} for s in tally.samples],
    }
    save(result, options.out)
    plot(outcome, f"{result['machine']}; {options.minutes:g} minutes", options.out.with_suffix(".png"))
    print(f"{result['machine']}\n{dict(tally.statuses)}, {tally.promoted} promotions")
    for line in tally.surprises:
        print(f"not due: {line}")
    code = tell(bars)
    if code:
        print(f"the end of the server's log:\n{log[-3000:]}")
    print(f"{options.out} and {options.out.with_suffix('.png').name}")
    sys.exit(code)


if __name__ == "__main__":
    main()
