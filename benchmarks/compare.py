"""dermlens beside the servers that a user would otherwise take: same machine, weights, images and client, in one run.

make bench-peers
.venv/bin/python benchmarks/compare.py --rounds 1 --seconds 3 --only dermlens plain-torch

Every server is started, warmed, loaded and stopped in turn, round after round, so that a noisy minute falls on one
round of one server and not on the ranking; figures are medians over the rounds. Each peer runs twice: as its users
write it (torch eager, Pillow decodes in full) and with our preprocessing and OpenVINO engine inside. Peers live in
virtual environments of their own under .bench/, which read torch and OpenVINO from the project's.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
DATA = Path(os.environ.get("DERMLENS_DATA_DIR", ROOT.parent / "shared" / "data"))
PORT = 9100
START_S = 120  # longest wait for a server
TICK = os.sysconf("SC_CLK_TCK")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A server to start and how to ask it."""

    install: Sequence[str] = ()  # for pip; nothing: it runs in the project's environment
    python: str = sys.executable  # that makes the virtual environment
    script: str = ""
    path: str = "/predict"
    form: str = "raw"
    ready: str = "/docs"


PEERS = {
    "dermlens": Peer(ready="/readyz"),
    "plain": Peer(script="plain_server.py", form="multipart"),
    "litserve": Peer(install=["litserve>=0.2.16"], script="litserve_server.py", form="multipart", ready="/health"),
    "bentoml": Peer(install=["bentoml>=1.4"], script="bentoml_server.py", form="images", ready="/readyz"),
    "ray": Peer(install=["ray[serve]>=2.40"], script="ray_server.py", ready="/predict"),
    "pytriton": Peer(
        install=["nvidia-pytriton>=0.5"],
        python="/usr/bin/python3",  # its wheel needs the distribution's Python
        script="pytriton_server.py",
        path="/v2/models/lesion/infer",
        form="triton",
        ready="/v2/models/lesion/ready",
    ),
}
SCENARIOS = {  # name -> (images below DATA, clients)
    "predict 224×224": ("isic2020/train/malignant", 16),
    "predict full size": ("full_size", 8),
}
RUNS = ["dermlens", *(f"{peer}-{engine}" for peer in PEERS if peer != "dermlens" for engine in ("torch", "openvino"))]


def environment(name: str) -> Path:
    """The Python that runs a peer; its virtual environment is made at the first call."""
    peer = PEERS[name]
    if not peer.install:
        return Path(sys.executable)
    folder = BENCH / name
    done = folder / ".installed"
    if not done.is_file():
        print(f"installing {', '.join(peer.install)} into {folder}", flush=True)
        subprocess.run([peer.python, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *peer.install], check=True)
        (packages,) = (folder / "lib").glob("python3*/site-packages")
        (packages / "dermlens.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # behind the peer's own packages
        done.touch()
    return folder / "bin/python"


class Server:
    """A running server and its whole process group."""

    def __init__(self, run: str) -> None:
        name, _, engine = run.partition("-")
        self.peer = PEERS[name]
        python = environment(name)
        settings = os.environ | {
            "PORT": str(PORT),
            "PEER_ENGINE": engine,
            "PYTHONPATH": str(ROOT),
            "DERMLENS_PORT": str(PORT),
            "BENTOML_HOME": str(BENCH / "bentoml-home"),
        }
        command = [str(python), self.peer.script] if self.peer.script else [str(python), "-m", "app.cli", "serve"]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT / "benchmarks" / "peers" if self.peer.script else ROOT,
            env=settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.ready_s = self._wait()

    def _wait(self) -> float:
        while time.perf_counter() - self.started < START_S and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url('')}{self.peer.ready}", timeout=1):
                return time.perf_counter() - self.started
            time.sleep(0.05)
        raise RuntimeError(f"{self.peer.script or 'dermlens'} did not start within {START_S} s")

    def url(self, path: str | None = None) -> str:
        return f"http://127.0.0.1:{PORT}{self.peer.path if path is None else path}"

    def _processes(self) -> list[Path]:
        session = str(self.process.pid)
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "stat").read_text().rpartition(")")[2].split()[3] == session:
                    found.append(folder)
        return found

    def cpu_s(self) -> float:
        """CPU seconds that the server's processes have used so far."""
        total = 0.0
        for folder in self._processes():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / TICK
        return total

    def resident_mb(self) -> float:
        """Resident memory of the server's processes, pages that they share counted in each."""
        total = 0.0
        for folder in self._processes():
            with contextlib.suppress(OSError):
                lines = (folder / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
        return total

    def stop(self) -> None:
        """End the server, gently and then not."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(1)


@contextlib.contextmanager
def running(run: str) -> Iterator[Server]:
    server = Server(run)
    try:
        yield server
    finally:
        server.stop()


def load(url: str, images: Path, *, form: str, seconds: float, **options: float) -> Figures:
    """What `load.py`, in a process of its own, sees of a server."""
    extra = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "load.py", url, str(images), "--format", form, "--seconds", str(seconds), *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks")
    found: Figures = json.loads(done.stdout)
    return found


def bare_engine(seconds: float) -> Figures:
    """Images a second of our engine in a loop at its best batch, on the same cores and without a server."""
    command = [sys.executable, "benchmarks/engine.py", "--loop", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: Figures = json.loads(done.stdout)
    return found


def measure(run: str, *, seconds: float, ours: bool) -> Figures:
    """One round of one server."""
    with running(run) as server:
        found: Figures = {"ready_s": round(server.ready_s, 2)}
        if ours:
            before = server.cpu_s()
            time.sleep(5)
            found["idle_cpu_percent"] = round((server.cpu_s() - before) / 5 * 100, 2)
        for name, (folder, clients) in SCENARIOS.items():
            warm = load(server.url(), DATA / folder, form=server.peer.form, seconds=2, clients=clients)
            if not warm["per_s"]:
                raise RuntimeError(f"it answers nothing but {warm['statuses']}")
            found[name] = load(server.url(), DATA / folder, form=server.peer.form, seconds=seconds, clients=clients)
        if run in ("dermlens", "plain-torch"):
            folder, clients = SCENARIOS["predict 224×224"]
            url = server.url("/explain")
            load(url, DATA / folder, form=server.peer.form, seconds=2, clients=clients)
            found["explain 224×224"] = load(url, DATA / folder, form=server.peer.form, seconds=seconds, clients=clients)
        found["resident_mb"] = round(server.resident_mb())
        if ours:
            for route in ("/predict", "/explain"):
                found[f"one client {route}"] = load(
                    server.url(route), DATA / folder, form="raw", seconds=seconds / 2, clients=1
                )
            rate = 0.7 * found["predict 224×224"]["per_s"]
            before_s = service_s(server)
            loop = load(server.url(), DATA / folder, form="raw", seconds=2 * seconds, rate=rate)
            spent = [after - before for after, before in zip(service_s(server), before_s, strict=True)]
            found["open loop at 70%"] = loop | {"mean_service_ms": 1000 * (spent[0] / spent[1] + spent[2] / spent[3])}
    return found


def service_s(server: Server) -> list[float]:
    """Seconds and requests so far in decoding and in the forward pass, from the server's own metrics."""
    with urllib.request.urlopen(server.url("/metrics")) as answer:
        lines = answer.read().decode().splitlines()
    names = [
        f'dermlens_stage_seconds_{part}{{stage="{s}"}} ' for s in ("decode", "forward") for part in ("sum", "count")
    ]
    return [float(next(line for line in lines if line.startswith(name)).rsplit(" ", 1)[1]) for name in names]


def medians(rounds: Sequence[Figures]) -> Figures:
    """Element-wise medians of the numbers of several rounds."""
    found: Figures = {}
    for key in rounds[0]:
        values = [r[key] for r in rounds]
        if isinstance(values[0], dict):
            found[key] = medians([v for v in values if v]) if key != "statuses" else values
        elif all(isinstance(v, int | float) for v in values):
            found[key] = statistics.median(values)
    return found


def ratios(found: dict[str, Figures], bare: Figures) -> Figures:
    """The figures that issue 4 sets bars on."""
    ours = found["dermlens"]
    small, large = SCENARIOS
    answer: Figures = {}
    for label, engine in (("as its users write it", "torch"), ("with our engine inside", "openvino")):
        peers = {run: f for run, f in found.items() if run.endswith(engine)}
        for scenario in (small, large):
            if peers:
                rates = {run: peer[scenario]["per_s"] for run, peer in peers.items()}
                best = max(rates, key=rates.__getitem__)
                answer[f"{scenario}, against the best peer {label} ({best})"] = (
                    ours[scenario]["per_s"] / peers[best][scenario]["per_s"]
                )
                if engine == "openvino":
                    answer[f"{scenario}, p99 over that of {best}"] = (
                        ours[scenario]["p99_ms"] / peers[best][scenario]["p99_ms"]
                    )
    answer["served over the bare engine loop"] = ours[small]["per_s"] / bare["per_s"]
    answer["explain over predict, median latency of one client"] = (
        ours["one client /explain"]["p50_ms"] / ours["one client /predict"]["p50_ms"]
    )
    if "plain-torch" in found:
        answer["explain, against captum behind plain FastAPI"] = (
            ours["explain 224×224"]["per_s"] / found["plain-torch"]["explain 224×224"]["per_s"]
        )
    loop = ours["open loop at 70%"]
    answer["p99 at 70% load over the mean service time (decode and forward of the same requests)"] = (
        loop["p99_ms"] / loop["mean_service_ms"]
    )
    answer["p99 at 70% load over the median latency of one client"] = (
        loop["p99_ms"] / ours["one client /predict"]["p50_ms"]
    )
    return {key: round(value, 3) for key, value in answer.items()}


def machine() -> str:
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))
    ]
    name, flags = model[0].partition(":")[2].strip(), model[1]
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if f" {kind}" in flags]
    limit = f", limited to {isa}" if (isa := os.environ.get("ONEDNN_MAX_CPU_ISA")) else ""
    return f"{name}, {os.cpu_count()} cores, {', '.join(kinds)}{limit}; Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    options = parser.parse_args()
    if not (DATA / "full_size").is_dir():
        sys.exit(f"compare: no images in {DATA}: set DERMLENS_DATA_DIR (docs/training.md)")
    rounds: dict[str, list[Figures]] = {run: [] for run in options.only}
    loops: list[Figures] = []
    for number in range(options.rounds):
        for run in list(rounds):
            began = time.perf_counter()
            try:
                rounds[run].append(measure(run, seconds=options.seconds, ours=run == "dermlens"))
            except (RuntimeError, subprocess.CalledProcessError, OSError, urllib.error.URLError) as error:
                print(f"round {number + 1}  {run}: left out: {error}", flush=True)
                del rounds[run]
                continue
            rates = {name: rounds[run][-1][name]["per_s"] for name in SCENARIOS}
            print(f"round {number + 1}  {run:18} {rates}  {time.perf_counter() - began:.0f} s", flush=True)
        loops.append(bare_engine(options.seconds))
    found = {run: medians(values) for run, values in rounds.items()}
    bare = medians(loops)
    result = {
        "machine": machine(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "bare engine loop": bare,
        "medians": found,
        "ratios": ratios(found, bare),
        "every round": rounds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    write_tables(result, options.out)


def write_tables(result: Figures, out: Path) -> None:
    """A Markdown table and a plot beside the JSON."""
    found = result["medians"]
    lines = [f"{result['machine']}. Medians of {result['rounds']} rounds of {result['seconds']:g} s.", ""]
    lines += [
        "| server | " + " | ".join(f"{s}, requests/s (p50, p99 ms)" for s in SCENARIOS) + " | failed | ready s | MB |"
    ]
    lines += ["| --- |" + " --- |" * (len(SCENARIOS) + 3)]
    for run, figures in found.items():
        cells = [
            f"{figures[s]['per_s']:.1f} ({figures[s]['p50_ms']:.0f}, {figures[s]['p99_ms']:.0f})" for s in SCENARIOS
        ]
        failed = sum(figures[s]["failed"] for s in SCENARIOS)
        lines.append(
            f"| {run} | {' | '.join(cells)} | {failed:g} | {figures['ready_s']:.1f} | {figures['resident_mb']:.0f} |"
        )
    lines += ["", "| measure | ratio |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in result["ratios"].items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(result, out.with_suffix(".png"))
    print(f"done: {out}, {out.with_suffix('.md').name}, {out.with_suffix('.png').name}")


def plot(result: Figures, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = result["medians"]
    figure, axes = plt.subplots(1, len(SCENARIOS), figsize=(11, 4.5), layout="constrained")
    for axis, scenario in zip(axes, SCENARIOS, strict=True):
        rates = {run: float(figures[scenario]["per_s"]) for run, figures in found.items()}
        names = sorted(rates, key=rates.__getitem__)
        colours = ["#b02a6e" if n == "dermlens" else "#54188a" if n.endswith("openvino") else "#8a8fb0" for n in names]
        bars = axis.barh(names, [rates[n] for n in names], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(f"{scenario}, {SCENARIOS[scenario][1]} clients")
        axis.set_xlabel("requests a second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result["machine"], fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
