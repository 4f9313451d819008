"""What the dashboard shows of minutes of varied load, as a picture: docs/images/dashboard.png.

.venv/bin/python benchmarks/dashboard.py --minutes 3    # needs Debian's package prometheus

One `dermlens serve`, with its own version in the shadow, under every kind of request of the soak; a Prometheus with the
rules of deploy/prometheus scrapes it each second. Then the queries of deploy/grafana's own panels are asked over these
minutes, and drawn by matplotlib in the dashboard's places: the same queries, not Grafana itself.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml  # type: ignore[import-untyped]
from compare import ROOT, machine
from load import Target, open_loop
from overload import serving
from soak import SETTINGS, catalogue, mix

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "dermlens.json").read_text())
EVERY_S = 1  # between scrapes
RATE_WINDOW_S = 15  # for Grafana's $__rate_interval, which is a minute or more where scrapes are 15 s apart
READY_S = 30
# Share of the time, requests a second: a quiet morning, a busy one, more than two cores can do, and quiet again
PHASES = ((0.3, 2.0), (0.25, 5.0), (0.15, 40.0), (0.3, 2.0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def adapt(folder: Path, target: str, *, key: Path | None = None) -> Path:
    """deploy/prometheus for one server on this host, and for minutes in place of days; returns the configuration."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{EVERY_S}s", "evaluation_interval": f"{EVERY_S}s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    if key is None:
        del job["authorization"]
    else:
        job["authorization"]["credentials_file"] = str(key)
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def scraping(target: str, *, key: Path | None = None) -> Iterator[str]:
    """A Prometheus that scrapes `target` each second, by its address.

    Raises:
        RuntimeError: it does not get ready.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"127.0.0.1:{free_port()}"
        config = adapt(folder, target, key=key)
        options = [
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        process = subprocess.Popen(["prometheus", *options], stderr=subprocess.DEVNULL)  # noqa: S607
        try:
            _wait_until_ready(process, f"http://{address}/-/ready")
            while not ask(f"http://{address}", "query", query="up")[
                "result"
            ]:  # it looks for targets after five seconds
                time.sleep(0.1)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(20)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(READY_S * 20):
        if process.poll() is not None:
            raise RuntimeError(f"prometheus ended with {process.returncode}: see `promtool check config`")
        try:
            with urlopen(url):
                return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError(f"prometheus is not ready after {READY_S} s")


def ask(address: str, path: str, **parameters: object) -> Any:
    """`data` of an answer of Prometheus's HTTP API."""
    with urlopen(f"{address}/api/v1/{path}?{urlencode(parameters)}") as answer:
        return json.load(answer)["data"]


def queries() -> Iterator[tuple[str, str]]:
    """Every panel's title and each of its queries."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], as_asked(target["expr"])


def as_asked(expression: str) -> str:
    """A panel's query as Grafana sends it."""
    return expression.replace("$__rate_interval", f"{RATE_WINDOW_S}s")


async def load(port: int, minutes: float) -> None:
    """Every kind of request of the soak that waits for its answer, at the pace of `PHASES`."""
    actions = [action for action in catalogue() if not action.leaves]
    requests = [action.request for action in itertools.islice(mix(actions, "dashboard"), 1024)]
    target = Target("127.0.0.1", port, requests)
    for number, (share, rate) in enumerate(PHASES):
        seconds = 60 * minutes * share
        print(f"dashboard: {rate:g} requests a second for {seconds:.0f} s", file=sys.stderr)
        await open_loop(target, rate=rate, seconds=seconds, seed=number)


def draw(found: Mapping[str, list[tuple[str, list[float], list[float]]]], caption: str, path: Path) -> None:
    """Each panel's series, as (legend, minutes, values), in the dashboard's grid."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    panels = DASHBOARD["panels"]
    rows = 1 + max(panel["gridPos"]["y"] // 8 for panel in panels)
    figure, axes = plt.subplots(rows, 3, figsize=(16, 2.9 * rows), layout="constrained")
    for panel in panels:
        axis = axes[panel["gridPos"]["y"] // 8, panel["gridPos"]["x"] // 8]
        series = found[panel["title"]]
        for name, minutes, values in series:
            axis.plot(minutes, values, label=name, linewidth=1.3)
        axis.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if not series:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.text(0.5, 0.5, "no data in this run", ha="center", va="center", transform=axis.transAxes, color="grey")
            continue
        highest = max(value for _, _, values in series for value in values)
        axis.set_ylim(0, 1.5 * highest or 1)  # room for the legend
        axis.set_xlabel("minutes", fontsize=8)
        axis.yaxis.set_major_formatter(FuncFormatter(FORMATS[panel["fieldConfig"]["defaults"]["unit"]]))
        axis.legend(fontsize=7, frameon=False, ncols=min(4, (len(series) + 2) // 3), loc="upper left", labelspacing=0.3)
    figure.suptitle(caption, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _seconds(value: float, _: object) -> str:
    return f"{value:g} s" if value >= 1 or not value else f"{1000 * value:g} ms"


FORMATS = {
    "reqps": lambda value, _: f"{value:g}/s",
    "s": _seconds,
    "percentunit": lambda value, _: f"{100 * value:g}%",
    "bytes": lambda value, _: f"{value / 1e6:g} MB",
    "short": lambda value, _: f"{value:g}",
}


def ranges(address: str, started: float, ended: float) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """What each panel's queries give over these seconds; NaN of nothing is left out."""
    found: dict[str, list[tuple[str, list[float], list[float]]]] = {p["title"]: [] for p in DASHBOARD["panels"]}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = as_asked(target["expr"])
            answer = ask(address, "query_range", query=query, start=started, end=ended, step=EVERY_S)
            for series in answer["result"]:
                points = [(at, float(value)) for at, value in series["values"] if value not in ("NaN", "+Inf", "-Inf")]
                if points:
                    minutes = [(at - started) / 60 for at, _ in points]
                    found[panel["title"]].append(
                        (legend(target["legendFormat"], series["metric"]), minutes, [value for _, value in points])
                    )
    return found


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}` filled in."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template.replace("{{version}}", "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "dashboard.png")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        sys.exit("dashboard: there is no prometheus here: apt-get install prometheus")
    shadow = {"DERMLENS_SHADOW_VERSION": (ROOT / "model_store" / "asff-resnet50" / "current").read_text().strip()}
    with serving(SETTINGS | shadow) as served, scraping(f"127.0.0.1:{served.port}") as address:
        started = time.time()
        asyncio.run(load(served.port, options.minutes))
        time.sleep(2 * EVERY_S)  # the last answers are scraped
        found = ranges(address, started, time.time())
    caption = f"The dashboard's queries over {options.minutes:g} minutes, drawn by matplotlib. {machine()}"
    draw(found, caption, options.out)
    empty = [title for title, series in found.items() if not series]
    print(f"dashboard: {len(found)} panels in {options.out}; without data: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
