"""Ten times what the server can do, for a minute: does it still answer what it accepts, and refuse the rest at once?

.venv/bin/python benchmarks/overload.py
.venv/bin/python benchmarks/overload.py --rounds 1 --seconds 10 --times 4

Saturation (16 closed-loop clients) is measured before and after each flood, against one `dermlens serve` with its
default settings; figures are medians over the rounds. The flood is open loop: requests leave at random moments
(Poisson) whether or not the last was answered. Client and server share the machine's cores, so the client does next
to nothing: bytes made beforehand, open connections, one callback an answer. Exit code 1 where a bar is missed.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import uvloop
from compare import ROOT, TICK, machine
from load import Target, arrivals, closed_loop, http, status_of, whole_head

from training.drawn import draw_lesion

DEADLINE_MS = 5000
CLIENTS = 16
MOST_CONNECTIONS = 4000
READY_S = 120  # longest wait for the server
LOST = 0  # in place of a status: the connection broke, or nothing came


class Bar(NamedTuple):
    """A figure and what it has to be; NaN, where there was nothing to measure, is a miss."""

    measure: str
    found: float
    bar: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.found >= self.bar if self.at_least else self.found <= self.bar


def tell(bars: Sequence[Bar]) -> int:
    """Print the table; the exit code, 1 where a bar is missed."""
    width = max(len(bar.measure) for bar in bars)
    for bar in bars:
        sign = "≥" if bar.at_least else "≤"
        print(f"{bar.measure:{width}}  {bar.found:10.4g}  {sign} {bar.bar:<8.4g} {'met' if bar.met else 'MISSED'}")
    missed = [bar.measure for bar in bars if not bar.met]
    print("missed: " + "; ".join(missed) if missed else "every bar is met")
    return 1 if missed else 0


def save(result: Mapping[str, Any], path: Path) -> None:
    """As JSON, NaN as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strict = json.loads(json.dumps(result), parse_constant=lambda _: None)
    path.write_text(json.dumps(strict, indent=1) + "\n")


class Vitals(NamedTuple):
    """A server's processes together, from /proc."""

    rss_mb: float
    pss_mb: float
    fds: int
    threads: int
    cpu_s: float


def vitals(pid: int) -> Vitals:
    """Of a process that leads its session, and of every other in that session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == pid:
                rss_mb, pss_mb = _megabytes(folder / "status", "VmRSS"), _megabytes(folder / "smaps_rollup", "Pss")
                cpu_s = (int(stat[11]) + int(stat[12])) / TICK
                found.append((rss_mb, pss_mb, len(os.listdir(folder / "fd")), int(stat[17]), cpu_s))
    rss_mb, pss_mb, fds, threads, cpu_s = (sum(column) for column in zip(*found, strict=True))
    return Vitals(rss_mb, pss_mb, int(fds), int(threads), cpu_s)


def _megabytes(path: Path, key: str) -> float:
    lines = [line for line in path.read_text().splitlines() if line.startswith(f"{key}:")]
    return sum(int(line.split()[1]) for line in lines) / 1024


class Served(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    log: Path  # what it wrote to its standard error


@contextlib.contextmanager
def serving(settings: Mapping[str, str]) -> Iterator[Served]:
    """A ready `dermlens serve` in a session of its own; stopped at the end where it still runs.

    Raises:
        RuntimeError: it did not become ready; the message carries the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
                cwd=ROOT,
                env=os.environ | settings,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        try:
            _wait_until_ready(process, port, log)
            yield Served(process, port, log)
        finally:
            stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < READY_S and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"dermlens did not become ready: {log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> int:
    """The exit code after SIGTERM, or after SIGKILL where that did not end it within 40 s."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


class Answer(NamedTuple):
    sent: float  # seconds on the client's clock
    seconds: float  # from sending to the whole answer
    status: int  # or LOST
    retry_after: bool


class Flood:
    """Requests on a pool of keep-alive connections; each answer is a callback, and no task or future is made for it."""

    def __init__(self, target: Target) -> None:
        self.answers: list[Answer] = []
        self.lost: Counter[str] = Counter()  # by reason
        self.lags: list[float] = []  # seconds between the moment planned and the sending
        self.idle: list[_Wire] = []
        self.sent = 0
        self._target = target
        self._turn = itertools.cycle(target.requests)
        self._wires = 0  # open connections
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        return self.sent - len(self.answers)

    async def offer(self, *, rate: float, seconds: float, seed: int) -> float:
        """Send `rate` a second for `seconds`, then wait for what is out; when it began, on the client's clock."""
        await asyncio.gather(*(self._open() for _ in range(CLIENTS * 16)))
        started = reported = time.perf_counter()
        due = arrivals(rate, seconds, random.Random(seed))  # noqa: S311 - a schedule, not a secret
        at = next(due, None)
        while at is not None:
            await asyncio.sleep(0.002)  # what falls due meanwhile goes out together
            now = time.perf_counter()
            while at is not None and started + at <= now:
                self.lags.append(now - started - at)
                self._send()
                at = next(due, None)
            if now - reported >= 5:
                reported = now
                self._report(now - started)
        give_up = time.perf_counter() + 2 * DEADLINE_MS / 1000
        while self.in_flight and time.perf_counter() < give_up:
            await asyncio.sleep(0.01)
        self.lost["no answer"] += self.in_flight
        for wire in self.idle:
            wire.close()
        return started

    def _report(self, seconds: float) -> None:
        found = Counter(answer.status for answer in self.answers)
        print(f"  {seconds:3.0f} s  sent {self.sent}  {dict(found)}  waiting {self.in_flight}", flush=True)

    def _send(self) -> None:
        while self.idle:
            wire = self.idle.pop()
            if wire.open:
                self.sent += 1
                wire.send(next(self._turn))
                return
        if self._wires + len(self._opening) >= MOST_CONNECTIONS:
            self.lost["no free connection"] += 1
            return
        task = asyncio.create_task(self._open_and_send())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open_and_send(self) -> None:
        await self._open()
        if self.idle:
            self._send()

    async def _open(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: _Wire(self), self._target.host, self._target.port)
        except OSError:
            self.lost["connect"] += 1

    def opened(self, wire: "_Wire") -> None:
        self._wires += 1
        self.idle.append(wire)

    def closed(self, sent: float) -> None:
        """`sent` is that of the request that waits for its answer, 0 where none does."""
        self._wires -= 1
        if sent:
            self.lost["reset"] += 1
            self.answers.append(Answer(sent, time.perf_counter() - sent, LOST, retry_after=False))


class _Wire(asyncio.Protocol):
    """One connection of a flood."""

    def __init__(self, flood: Flood) -> None:
        self._flood = flood
        self._received = b""
        self._sent = 0.0  # when the request that waits for its answer left; 0: none waits

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._flood.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - of the protocol
        self._flood.closed(self._sent)

    @property
    def open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def send(self, request: bytes) -> None:
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if (head := whole_head(self._received)) is None:
            return
        took = time.perf_counter() - self._sent
        self._flood.answers.append(Answer(self._sent, took, status_of(head), b"\r\nretry-after:" in head))
        self._received, self._sent = b"", 0.0
        self._flood.idle.append(self)


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p99 and largest in milliseconds; NaN of nothing."""
    if not seconds:
        return dict.fromkeys(("median", "p99", "max"), float("nan"))
    found = 1000 * np.percentile(seconds, (50, 99, 100))
    return dict(zip(("median", "p99", "max"), map(float, found), strict=True))


@dataclass(frozen=True)
class Round:
    """One flood, as the client saw it."""

    seconds: float
    started: float
    answers: Sequence[Answer]
    lost: Mapping[str, int]
    lags: Sequence[float]

    def summary(self) -> dict[str, Any]:
        """Rates a second and latencies in milliseconds; what was accepted is what was neither refused nor lost."""
        took = {kind: [a.seconds for a in self.answers if a.status == kind] for kind in (200, 503)}
        refused = [a for a in self.answers if a.status == 503]
        # A 504 is a request that was accepted and missed its deadline
        accepted = [a.seconds for a in self.answers if a.status in (200, 504)]
        end = self.started + self.seconds
        good = [a for a in self.answers if a.status == 200 and a.sent + a.seconds <= end]
        statuses = Counter(a.status for a in self.answers if a.status != LOST)
        return {
            "offered_per_s": len(self.lags) / self.seconds,
            "goodput_per_s": sum(a.seconds <= DEADLINE_MS / 1000 for a in good) / self.seconds,
            "refused_ms": spread_ms(took[503]),
            "answered_ms": spread_ms(took[200]),
            "accepted_ms": spread_ms(accepted),
            "share": {str(status): count / len(self.lags) for status, count in sorted(statuses.items())},
            "other": sum(count for status, count in statuses.items() if status not in (200, 503, 504)),
            "without_retry_after": sum(not a.retry_after for a in refused),
            "lost": dict(self.lost),
            "client_lag_ms": spread_ms(self.lags),
        }

    def by_second(self) -> dict[str, list[float]]:
        """For the plot: what was offered, and what was answered when, and how long that took."""
        whole = int(np.ceil(self.seconds))
        series: dict[str, list[float]] = {
            "offered": np.bincount([int(a.sent - self.started) for a in self.answers], minlength=whole).tolist()
        }
        for status in (200, 503):
            slots: list[list[float]] = [[] for _ in range(whole)]
            for a in self.answers:
                second = int(a.sent + a.seconds - self.started)
                if a.status == status and second < whole:
                    slots[second].append(a.seconds)
            series[str(status)] = [len(slot) for slot in slots]
            for key in ("median", "p99"):
                series[f"{status} {key} ms"] = [spread_ms(slot)[key] for slot in slots]
        return series


def bars_of(rounds: Sequence[Mapping[str, Any]], saturations: Sequence[float], *, times: float) -> list[Bar]:
    """The bars of the issue; latencies and rates are medians over the rounds, counts are sums."""
    saturation = statistics.median(saturations)

    def middle(*keys: str) -> float:
        found: list[float] = []
        for figures in rounds:
            value: Any = figures
            for key in keys:
                value = value[key]
            found.append(value)
        return float(np.median(found))  # NaN where one is

    return [
        Bar("goodput over saturation", middle("goodput_per_s") / saturation, 0.90, at_least=True),
        Bar("p99 of a 503, ms", middle("refused_ms", "p99"), 50),
        Bar("p99 of what was accepted, ms", middle("accepted_ms", "p99"), DEADLINE_MS),
        Bar("503 without Retry-After", sum(figures["without_retry_after"] for figures in rounds), 0),
        Bar("answers other than 200, 503, 504", sum(figures["other"] for figures in rounds), 0),
        Bar("lost: connect, reset, no connection, no answer", sum(sum(f["lost"].values()) for f in rounds), 0),
        Bar("offered over saturation", middle("offered_per_s") / saturation, 0.95 * times, at_least=True),
    ]


def requests() -> list[bytes]:
    """Sixteen drawn lesions, 224×224 JPEG."""
    made = []
    for seed in range(16):
        buffer = io.BytesIO()
        draw_lesion(seed % 2, seed).save(buffer, "JPEG", quality=98)
        headers = {"host": "127.0.0.1", "content-type": "image/jpeg", "x-timeout-ms": str(DEADLINE_MS)}
        made.append(http("POST", "/predict", headers=headers, body=buffer.getvalue()))
    return made


def saturation(target: Target, seconds: float) -> float:
    """Requests a second that 16 closed-loop clients get answered with 200.

    Raises:
        RuntimeError: it answers none of them so.
    """
    load = uvloop.run(closed_loop(target, clients=CLIENTS, seconds=seconds))
    if not load.latencies:
        raise RuntimeError(f"the server answers nothing but {dict(load.statuses)}")
    return len(load.latencies) / load.seconds


def flood(served: Served, target: Target, *, rate: float, seconds: float, seed: int) -> tuple[Round, dict[str, Any]]:
    """One round, and its summary with the server's memory and the CPU of both."""
    sea, before, client_before = Flood(target), vitals(served.process.pid), time.process_time()
    began = time.perf_counter()
    started = uvloop.run(sea.offer(rate=rate, seconds=seconds, seed=seed))
    spent = time.perf_counter() - began
    client_cpu, after = time.process_time() - client_before, vitals(served.process.pid)
    found = Round(seconds, started, sea.answers, sea.lost, sea.lags)
    return found, found.summary() | {
        "rss_before_mb": before.rss_mb,
        "rss_after_mb": after.rss_mb,
        "server_cpus": (after.cpu_s - before.cpu_s) / spent,
        "client_cpus": client_cpu / spent,
    }


def plot(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rates, times) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    series = result["last round by second"]
    colours = {"offered": "#8a8fb0", "200": "#54188a", "503": "#b02a6e"}
    seconds = range(len(series["200"]))
    for key, colour in colours.items():
        rates.plot(seconds, series[key][: len(seconds)], color=colour, label=key)
    rates.axhline(result["saturation_per_s"], color="#54188a", linestyle=":", label="saturation")
    rates.set_ylabel("requests a second")
    for status in ("200", "503"):
        for key, style in (("median", "-"), ("p99", "--")):
            label, values = f"{status} {key}", series[f"{status} {key} ms"]
            times.plot(seconds, values, color=colours[status], linestyle=style, label=label)
    for limit in (50, DEADLINE_MS):
        times.axhline(limit, color="black", linewidth=0.6, linestyle=":")
    times.set_ylabel("milliseconds; dotted: the bars")
    times.set_xlabel("seconds")
    for axis in (rates, times):
        axis.set_yscale("log")
        axis.legend(ncols=4, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result["machine"], fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each flood")
    parser.add_argument("--times", type=float, default=10, help="saturation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=float, default=10, help="seconds of each measurement of saturation")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overload.json")
    options = parser.parse_args()
    summaries: list[dict[str, Any]] = []
    with serving({}) as served:
        target = Target("127.0.0.1", served.port, requests())
        saturation(target, options.warm / 2)  # warms
        saturations = [saturation(target, options.warm)]
        for number in range(options.rounds):
            rate = options.times * saturations[-1]
            print(f"round {number + 1}: saturation {saturations[-1]:.1f}/s, offering {rate:.0f}/s", flush=True)
            last, summary = flood(served, target, rate=rate, seconds=options.seconds, seed=number)
            summaries.append(summary)
            saturations.append(saturation(target, options.warm))
            print(f"round {number + 1}: {summary}", flush=True)
    bars = bars_of(summaries, saturations, times=options.times)
    result = {
        "machine": machine(),
        "seconds": options.seconds,
        "times": options.times,
        "saturation_per_s": statistics.median(saturations),
        "saturations_per_s": saturations,
        "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
        "rounds": summaries,
        "last round by second": last.by_second(),
    }
    save(result, options.out)
    plot(result, options.out.with_suffix(".png"))
    print(f"{result['machine']}\n{options.out} and {options.out.with_suffix('.png').name}")
    sys.exit(tell(bars))


if __name__ == "__main__":
    main()
