"""A discrete-event simulation of one server, and a check of it against a running one.

setsid --wait .venv/bin/python benchmarks/simulate.py    # measures, simulates the same arrivals, writes results/

The model: requests arrive, are let in or refused as `MicroBatcher.admit` does (docs/decisions/008-admission.md), wait,
and leave in batches formed whenever the device takes one. A batch takes as long as a forward pass of its size did in a
measurement, alone or beside another, and `beside_s` of the cores for each of its images: decoding, HTTP and the client.
That one number is fitted, at saturation; everything at other loads follows from it.
"""

import argparse
import asyncio
import math
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compare import ROOT, machine
from load import Load, Target, arrivals, open_loop
from overload import DEADLINE_MS, requests, saturation, save, serving

from app.batcher import HOPE
from app.engines.base import Engine, build_engine
from app.model import store

SHARES = (0.3, 0.5, 0.7, 0.9, 1.3, 2.0)  # of saturation
MAX_BATCH, MAX_QUEUE = 2, 64  # a short queue, so that a short run fills it
OK, BUSY, LATE = 200, 503, 504
Times = dict[tuple[int, int], list[float]]  # seconds of forward passes by (batch size, batches beside it)


class Answer(NamedTuple):
    arrived: float  # seconds from the start
    status: int
    seconds: float  # from the arrival to the answer


class Outcome(NamedTuple):
    """What a server made of a load; latencies are of 200s alone, NaN where there is none."""

    offered_per_s: float
    per_s: float  # answered with 200
    p50_ms: float
    p99_ms: float
    refused: float  # share of what was offered
    late: float


@dataclass
class Batch:
    """On the device; times in seconds."""

    came: list[float]
    started: float
    ends: float


def simulate(
    arrived: Iterable[float],
    service_s: Callable[[int, int], float],
    *,
    max_batch: int,
    in_flight: int = 1,
    max_queue: int = 256,
    max_wait_s: float = 0,
    timeout_s: float = 30,
) -> list[Answer]:
    """The answer to each arrival, by a server with one device.

    Args:
        arrived: seconds, rising.
        service_s: seconds that a batch of this size takes which begins beside so many others.
        in_flight: batches on the device at once.
    """
    answers: list[Answer] = []
    waiting: deque[float] = deque()
    running: list[Batch] = []
    free = 0.0  # since when there is room on the device, if there is
    pace_s = 0.1  # as the batcher's first guess

    def finish(batch: Batch) -> None:
        nonlocal pace_s, free
        for at in batch.came:
            seconds = batch.ends - at
            answers.append(Answer(at, OK, seconds) if seconds < timeout_s else Answer(at, LATE, timeout_s))
        pace_s = 0.9 * pace_s + 0.1 * (batch.ends - batch.started) / len(batch.came) / len(running)
        running.remove(batch)
        free = batch.ends

    def give_up(now: float) -> None:
        while waiting and waiting[0] + timeout_s <= now:
            answers.append(Answer(waiting.popleft(), LATE, timeout_s))

    def advance(now: float) -> None:
        """Run every batch that begins before `now`."""
        while True:
            first = min(running, key=lambda batch: batch.ends, default=None)
            begin = math.inf
            if waiting and len(running) < in_flight:
                since = max(free, waiting[0])
                give_up(since)
                if not waiting:
                    continue
                short = sum(at <= since for at in waiting) < max_batch
                begin = max(since, waiting[0]) + (max_wait_s if short else 0)
            if first and first.ends <= min(begin, now):
                finish(first)
            elif begin <= now and begin < math.inf:
                give_up(begin)
                came: list[float] = []
                while waiting and len(came) < max_batch and waiting[0] <= begin:
                    came.append(waiting.popleft())
                running.append(Batch(came, begin, begin + service_s(len(came), len(running))))
            else:
                return

    for now in arrived:
        advance(now)
        give_up(now)
        before = len(waiting) + sum(at + timeout_s > now for batch in running for at in batch.came)
        hopeless = before > 2 * in_flight * max_batch and before * pace_s > HOPE * timeout_s
        if before >= max_queue or hopeless:
            answers.append(Answer(now, BUSY, 0))
        else:
            waiting.append(now)
    advance(math.inf)
    return answers


def outcome(answers: Sequence[Answer], *, seconds: float) -> Outcome:
    """Over a load that was offered for `seconds`."""
    served = [a.seconds for a in answers if a.status == OK]
    span = max([seconds, *(a.arrived + a.seconds for a in answers)])
    return Outcome(
        offered_per_s=len(answers) / seconds,
        per_s=len(served) / span,
        p50_ms=1000 * float(np.percentile(served, 50)) if served else math.nan,
        p99_ms=1000 * float(np.percentile(served, 99)) if served else math.nan,
        refused=sum(a.status == BUSY for a in answers) / max(1, len(answers)),
        late=sum(a.status == LATE for a in answers) / max(1, len(answers)),
    )


def measured(load: Load, *, seconds: float) -> Outcome:
    """The same of a real load; what is neither 200, 503 nor 504 is in no share."""
    total = sum(load.statuses.values())
    summary: Any = load.summary()
    return Outcome(
        offered_per_s=total / seconds,
        per_s=summary["per_s"],
        p50_ms=summary.get("p50_ms", math.nan),
        p99_ms=summary.get("p99_ms", math.nan),
        refused=load.statuses[str(BUSY)] / total,
        late=load.statuses[str(LATE)] / total,
    )


def times_of(engine: Engine, *, repeats: int, seed: int) -> Times:
    """Seconds of forward passes, the sizes in random order: changing it takes OpenVINO milliseconds."""
    images = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, 3, 224, 224), dtype=np.uint8)

    def seconds_of(size: int) -> float:
        started = time.perf_counter()
        engine.run(images[:size])
        return time.perf_counter() - started

    kinds = [(size, others) for size in range(1, MAX_BATCH + 1) for others in range(engine.in_flight)]
    found: Times = {kind: [] for kind in kinds}
    order = repeats * kinds
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    with ThreadPoolExecutor(engine.in_flight) as threads:
        for size, others in order:
            found[size, others] += threads.map(seconds_of, (1 + others) * [size])
    return found


def fitted(times: Times, saturation_per_s: float) -> float:
    """Seconds of the cores beside the forward pass for each image, which make full batches come out at the saturation
    measured."""
    batch, others = max(times)
    return max(0.0, 1 / saturation_per_s - statistics.mean(times[batch, others]) / batch / (1 + others))


def model_of(times: Times, beside_s: float, *, seed: int) -> Callable[[int, int], float]:
    """Service times drawn from those measured, so that their spread, the machine's noise, is in the simulation too."""
    source = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    return lambda batch, others: source.choice(times[batch, others]) + batch * (1 + others) * beside_s


def one_round(target: Target, engine: Engine, *, seconds: float, seed: int) -> dict[str, Any]:
    """Saturation, then each load with service times taken before and after it, so that a noisy minute is in both."""
    times = times_of(engine, repeats=8, seed=seed)
    saturations = [saturation(target, seconds)]
    loads: list[tuple[float, Outcome, list[float]]] = []
    for share in SHARES:
        rate = share * saturations[0]
        load = asyncio.run(open_loop(target, rate=rate, seconds=seconds, seed=seed))
        loads.append((rate, measured(load, seconds=seconds), list(os.getloadavg())))
        for kind, more in times_of(engine, repeats=4, seed=seed).items():
            times[kind] += more
        print(f"{share:4.1f} of saturation: {loads[-1][1]}", flush=True)
    saturations.append(saturation(target, seconds))
    beside_s = fitted(times, statistics.mean(saturations))
    rows = []
    for (rate, real, busy), share in zip(loads, SHARES, strict=True):
        same = arrivals(rate, seconds, random.Random(seed))  # noqa: S311 - as `open_loop` made them
        service_s = model_of(times, beside_s, seed=seed)
        limits: Any = {"max_batch": MAX_BATCH, "max_queue": MAX_QUEUE, "timeout_s": DEADLINE_MS / 1000}
        answers = simulate(same, service_s, in_flight=engine.in_flight, **limits)
        simulated = outcome(answers, seconds=seconds)
        rows.append(
            {"share": share, "measured": real._asdict(), "simulated": simulated._asdict(), "load_average": busy}
        )
    spread = {
        f"{batch}, {others} beside it": [1000 * q for q in np.percentile(values, (5, 50, 95))]
        for (batch, others), values in times.items()
    }
    return {
        "saturations_per_s": saturations,
        "beside_ms": 1000 * beside_s,
        "forward_ms_p5_p50_p95": spread,
        "loads": rows,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("per_s", "answered a second"),
        ("p50_ms", "median, ms"),
        ("p99_ms", "p99, ms"),
        ("refused", "share of 503"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for number, found in enumerate(result["rounds"]):
            for kind, style in (("measured", "o"), ("simulated", "-")):
                values = [row[kind][key] for row in found["loads"]]
                label = kind if not number else None
                axis.plot([row["share"] for row in found["loads"]], values, style, color=f"C{number}", label=label)
        axis.set_title(title)
        axis.set_xlabel("offered, of saturation")
        axis.spines[["top", "right"]].set_visible(False)
        if key.endswith("_ms"):
            axis.set_yscale("log")
    axes[0].legend()
    figure.suptitle(f"{result['machine']}; a colour is a round", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "simulate.json")
    options = parser.parse_args()
    if os.getsid(0) != os.getpid():  # the engine would be timed with another share of the processors than the server's
        sys.exit("start it with setsid --wait: Linux divides processors by session, and the server has its own")
    root = ROOT / "model_store"
    version = store.load(root, "asff-resnet50", store.current(root, "asff-resnet50"))
    threads = int(os.environ.get("DERMLENS_CPU_THREADS", "0"))
    engine = build_engine("openvino", version, threads=threads)
    times_of(engine, repeats=1, seed=0)  # warms
    settings = {
        "DERMLENS_MAX_QUEUE": str(MAX_QUEUE),
        "DERMLENS_MAX_BATCH": str(MAX_BATCH),
        "DERMLENS_ENGINE": "openvino",
    }
    rounds = []
    with serving(settings) as served:
        target = Target("127.0.0.1", served.port, requests())
        saturation(target, 3)  # warms
        for number in range(options.rounds):
            rounds.append(one_round(target, engine, seconds=options.seconds, seed=number))
            print(f"round {number + 1}: {rounds[-1]['saturations_per_s']}", flush=True)
    result = {
        "machine": machine(),
        "precision": engine.precision,
        "threads": threads,
        "seconds": options.seconds,
        "max_queue": MAX_QUEUE,
        "rounds": rounds,
    }
    save(result, options.out)
    plot(result, options.out.with_suffix(".png"))
    print(f"{'offered':>8} {'per_s':>15} {'p50 ms':>17} {'p99 ms':>17} {'503':>13}   measured, simulated")
    for found in rounds:
        for row in found["loads"]:
            pairs = [(row["measured"][key], row["simulated"][key]) for key in ("per_s", "p50_ms", "p99_ms", "refused")]
            print(f"{row['share']:8.1f} " + " ".join(f"{real:8.2f} {model:8.2f}" for real, model in pairs))
    print(f"done: {options.out} and {options.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
