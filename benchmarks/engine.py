"""The engines without a server: latency and images a second by batch size, beside the machine's own peak.

make bench
.venv/bin/python benchmarks/engine.py --loop 8    # images a second of the served engine at its best batch, as JSON

The floor: a forward pass needs so many multiply-adds and moves so many bytes, and the machine does so many a second in
a large matrix product of the same precision and in a large copy (both measured here). What the share of the peak lacks
to 100% is what is left to gain.
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare import DATA, ROOT, machine
from PIL import Image

from app.engines.base import Engine, EngineUnavailable, build_engine
from app.model import store
from app.model.openvino_graph import build_graph
from app.model.out_of_distribution import score_of
from app.model.preprocess import decode
from app.model.quality import assess, measure
from app.model.store import LoadedVersion

NAME = "asff-resnet50"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ENGINES = [("torch", "auto"), ("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8"), ("cuda", "auto")]
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes
PEAK_SIDE = 2048  # of the matrices that the peak is measured with


def seconds_of(work: Callable[[], object], *, budget: float) -> float:
    """Median duration of repeated calls for `budget` seconds, after two that do not count."""
    times: list[float] = []
    ends = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


class Work(NamedTuple):
    """Of one image."""

    flops: float
    values: float  # read and written by convolutions and matrix products, were nothing kept in a cache
    weights: float  # values, read once a batch


def work_of(version: LoadedVersion) -> Work:
    """What the convolutions and matrix products of the graph do; a multiply-add is two FLOPs."""
    graph = build_graph(version.manifest, version.weights)
    graph.reshape([1, 3, *[version.manifest.preprocessing.size] * 2])
    flops = values = weights = 0.0
    for op in graph.get_ops():
        if op.get_type_name() not in ("Convolution", "MatMul"):
            continue
        data, kernel, out = op.input(0).get_shape(), op.input(1).get_shape(), op.output(0).get_shape()
        depth = np.prod(kernel[1:]) if op.get_type_name() == "Convolution" else data[-1]
        flops += 2 * float(depth) * float(np.prod(out))
        values += float(np.prod(data)) + float(np.prod(out))
        weights += float(np.prod(kernel))
    return Work(flops, values, weights)


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = np.ones(1 << 28, dtype=np.uint8)
    target = np.empty_like(source)
    return float(2 * len(source) / seconds_of(lambda: np.copyto(target, source), budget=1))


def peak(precision: str, *, device: str) -> float | None:
    """FLOPs a second of a large matrix product, or None where torch has none for the precision."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision == "int8":
        a = torch.randint(-128, 127, (PEAK_SIDE, PEAK_SIDE), dtype=torch.int8, device=device)
        work: Callable[[], object] = partial(torch._int_mm, a, a)
    else:
        a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(kinds[precision])

        def work() -> object:
            product = a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            return product

    try:
        return float(2 * PEAK_SIDE**3 / seconds_of(work, budget=1))
    except RuntimeError:
        return None


def table(version: LoadedVersion, *, budget: float) -> list[dict[str, Any]]:
    """One row an engine and batch size."""
    rows: list[dict[str, Any]] = []
    work, moved = work_of(version), bandwidth()
    flops = work.flops
    size = version.manifest.preprocessing.size
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 3, size, size), dtype=np.uint8)
    print(f"{machine()}\n{flops / 1e9:.2f} GFLOP an image, {work.values / 1e6:.1f} million values moved, ", end="")
    print(f"{work.weights / 1e6:.1f} million weights; memory moves {moved / 1e9:.1f} GB/s\n")
    print(f"{'engine':22}{'batch':>6}{'ms':>9}{'ms/image':>10}{'images/s':>10}{'TFLOP/s':>9}{'of peak':>9}")
    for name, precision in ENGINES:
        try:
            engine: Engine = build_engine(name, version, precision=precision)  # type: ignore[arg-type]
        except EngineUnavailable as error:
            print(f"{name:22}{error}")
            continue
        most = peak(engine.precision, device="cuda" if name == "cuda" else "cpu")
        if most:
            width = WIDTHS[engine.precision]
            floors = 1000 * flops / most, 1000 * width * work.values / moved, 1000 * width * work.weights / moved
            print(
                f"{name} {engine.precision}: {most / 1e12:.2f} TFLOP/s in a matrix product, so an image needs ", end=""
            )
            print(
                f"{floors[0]:.2f} ms of arithmetic, {floors[1]:.2f} of memory; a batch {floors[2]:.2f} for its weights"
            )
        for batch in BATCHES:
            seconds = seconds_of(partial(engine.run, images[:batch]), budget=budget)
            rate = flops * batch / seconds
            row = {
                "engine": name,
                "precision": engine.precision,
                "device": engine.device,
                "batch": batch,
                "ms": 1000 * seconds,
                "images_per_s": batch / seconds,
                "tflops": rate / 1e12,
                "share_of_peak": rate / most if most else None,
            }
            rows.append(row)
            share = f"{rate / most:9.0%}" if most else f"{'—':>9}"
            line = (
                f"{1000 * seconds:9.2f}{1000 * seconds / batch:10.2f}{batch / seconds:10.1f}{rate / 1e12:9.3f}{share}"
            )
            print(f"{name + ' ' + engine.precision:22}{batch:6}{line}", flush=True)
    return rows


def decoding(*, budget: float) -> list[dict[str, Any]]:
    """Our scaled decode beside a full one by Pillow with the same resize, for each file of `full_size`."""
    rows = []
    print(f"\n{'image':22}{'size':>12}{'ours ms':>10}{'full ms':>10}{'ratio':>8}")
    for path in sorted((DATA / "full_size").glob("*.jpg")):
        data = path.read_bytes()

        def full(data: bytes = data) -> object:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            return np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))

        ours = seconds_of(partial(decode, data), budget=budget / 4)
        theirs = seconds_of(full, budget=budget / 4)
        seen = decode(data)
        size = f"{seen.width}×{seen.height}"
        rows.append({"image": path.name, "size": size, "ours_ms": 1000 * ours, "full_ms": 1000 * theirs})
        print(f"{path.name:22}{size:>12}{1000 * ours:10.1f}{1000 * theirs:10.1f}{ours / theirs:8.2f}", flush=True)
    return rows


def judging(version: LoadedVersion, rows: list[dict[str, Any]], *, budget: float) -> list[dict[str, Any]]:
    """What it costs to know when not to answer, beside the quickest forward pass of an image on this machine."""
    size = version.manifest.preprocessing.size
    image = np.random.default_rng(0).integers(0, 256, (3, size, size), dtype=np.uint8)
    work: dict[str, Callable[[], object]] = {"quality of an image": lambda: assess(measure(image))}
    if familiar := version.familiar:
        features = familiar.mean + familiar.rest
        work["out-of-distribution score"] = lambda: score_of(features, familiar)
    quickest = min(row["ms"] / row["batch"] for row in rows)
    found = []
    print(f"\n{'beside the forward pass':28}{'ms':>9}{'of it':>9}")
    for name, does in work.items():
        ms = 1000 * seconds_of(does, budget=budget / 4)
        found.append({"work": name, "ms": ms, "of_forward": ms / quickest})
        print(f"{name:28}{ms:9.3f}{ms / quickest:9.2%}", flush=True)
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label in dict.fromkeys(f"{row['engine']} {row['precision']}" for row in rows):
        mine = [row for row in rows if f"{row['engine']} {row['precision']}" == label]
        batches = [row["batch"] for row in mine]
        axes[0].plot(batches, [row["images_per_s"] for row in mine], marker="o", label=label)
        axes[1].plot(batches, [row["ms"] for row in mine], marker="o", label=label)
    for axis, title in zip(axes, ("images a second", "milliseconds a batch"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each engine and batch size")
    parser.add_argument("--loop", type=float, help="only run the served engine for so many seconds, and print JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.json")
    options = parser.parse_args()
    version = store.load(ROOT / "model_store", NAME, store.current(ROOT / "model_store", NAME))
    if options.loop:
        precision: Any = os.environ.get("DERMLENS_PRECISION", "auto")
        engine = build_engine("auto", version, precision=precision)
        images = np.zeros((max(BATCHES), 3, 224, 224), dtype=np.uint8)
        kinds = [(batch, at_once) for batch in (2, 4, 8, 16) for at_once in range(1, engine.in_flight + 1)]
        with ThreadPoolExecutor(engine.in_flight) as threads:

            def run(batch: int, at_once: int) -> None:
                list(threads.map(engine.run, at_once * [images[:batch]]))

            rates = {
                kind: math.prod(kind) / seconds_of(partial(run, *kind), budget=options.loop / len(kinds))
                for kind in kinds
            }
        batch, at_once = best = max(rates, key=lambda kind: rates[kind])
        print(json.dumps({"batch": batch, "at_once": at_once, "per_s": rates[best], "precision": engine.precision}))
        return
    rows = table(version, budget=options.seconds)
    if not (DATA / "full_size").is_dir():
        sys.exit(f"engine: no images in {DATA} for the decoding table: set DERMLENS_DATA_DIR (docs/training.md)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "engines": rows,
        "judging": judging(version, rows, budget=options.seconds),
        "decoding": decoding(budget=options.seconds),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, options.out.with_suffix(".png"))
    print(f"done: {options.out} and {options.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
