"""What the served version costs as the work grows: clients, image size, and the start itself.

.venv/bin/python benchmarks/growth.py
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import DATA, ROOT, load, machine, running
from PIL import Image

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIDES = (224, 512, 1024, 2048, 4096)
STARTS = 3


def by_clients(seconds: float) -> list[dict[str, Any]]:
    """Throughput and latency of /predict against the number of closed-loop clients, on 224×224 images."""
    rows = []
    with running("dermlens") as server:
        for clients in CLIENTS:
            images = DATA / "isic2020" / "train" / "malignant"
            found = load(server.url(), images, form="raw", seconds=seconds, clients=clients)
            rows.append({"clients": clients} | found)
            print(f"{clients:4} clients  {found}", flush=True)
    return rows


def by_image_size(seconds: float) -> list[dict[str, Any]]:
    """Latency of one client against the side of a square JPEG, scaled from the largest photograph."""
    rows = []
    source = max((DATA / "full_size").glob("*.jpg"), key=lambda path: path.stat().st_size)
    with tempfile.TemporaryDirectory() as folder, running("dermlens") as server, Image.open(source) as photograph:
        for side in SIDES:
            path = Path(folder) / f"{side}.jpg"
            photograph.resize((side, side)).save(path, quality=92)
            row: dict[str, Any] = {"side": side, "bytes": path.stat().st_size}
            for route in ("/predict", "/explain"):
                row[route] = load(server.url(route), path, form="raw", seconds=seconds, clients=1)
            rows.append(row)
            print(f"{side:5} pixels  {row}", flush=True)
    return rows


def starts() -> dict[str, float]:
    """Seconds from starting the process to ready: the first time here, and the median of the next."""
    times = []
    for _ in range(STARTS + 1):
        with running("dermlens") as server:
            times.append(server.ready_s)
    return {"first": times[0], "median_of_next": statistics.median(times[1:])}


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = result["clients"]
    clients = [row["clients"] for row in rows]
    axes[0].plot(clients, [row["per_s"] for row in rows], marker="o")
    axes[0].set_title("requests a second")
    for key in ("p50_ms", "p99_ms"):
        axes[1].plot(clients, [row[key] for row in rows], marker="o", label=key.removesuffix("_ms"))
    axes[1].set_title("milliseconds")
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("clients, closed loop, 224×224")
    axes[1].set_yscale("log")
    for route in ("/predict", "/explain"):
        pairs = [(row["side"], row[route]["p50_ms"]) for row in result["image size"]]
        axes[2].plot(*zip(*pairs, strict=True), marker="o", label=route)
    axes[2].set_title("median milliseconds, one client")
    axes[2].set_xlabel("side of a square JPEG, pixels")
    for axis in axes:
        axis.set_ylim(bottom=0 if axis is not axes[1] else None)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1:]:
        axis.legend()
    figure.suptitle(result["machine"], fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each load")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "growth.json")
    options = parser.parse_args()
    if not (DATA / "full_size").is_dir():
        sys.exit(f"growth: no images in {DATA}: set DERMLENS_DATA_DIR (docs/training.md)")
    result = {
        "machine": machine(),
        "start_s": starts(),
        "clients": by_clients(options.seconds),
        "image size": by_image_size(options.seconds / 2),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out.with_suffix(".png"))
    print(f"done: {options.out} and {options.out.with_suffix('.png').name}; start {result['start_s']}")


if __name__ == "__main__":
    main()
