"""How many servers a load needs, and what a million images cost; two tables in Markdown.

.venv/bin/python benchmarks/capacity.py            # from results/engine.json and results/growth.json
.venv/bin/python benchmarks/capacity.py --write    # into docs/scaling.md
.venv/bin/python benchmarks/capacity.py --cpu-price 0.12 --gpu-price 2.9

A server is held at 60% of what it can do, or less where its p99 would pass 250 ms; `simulate.py` says what its latency
is there. Beside those that the load needs there is one more, so that one may fail or be replaced.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from compare import ROOT
from load import arrivals
from simulate import Outcome, outcome, simulate

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = ("<!-- python benchmarks/capacity.py --write -->\n", "<!-- end -->\n")
DEMANDS_PER_S = (10, 1_000, 100_000)
HEADROOM = 0.6  # of what a server can do; at 70% the tail of a real one is two to three times the simulated
P99_MS, REFUSED = 250, 0.001  # the most that a server is loaded to
ARRIVALS = 10_000  # of each simulation
# Assumptions of 26 November 2026, USD an hour; give your own
CPU_PRICE, GPU_PRICE = 0.10, 3.50
# On paper, docs/performance.md: twice the card's floor for an image, and a guess at what launching a batch takes
H100_IMAGE_S, H100_BATCH_S = 25e-6, 0.5e-3
PROCESS_S = 1e-3  # a guess at what one Python process spends on a request; a mere refusal was measured at 0.4 ms
CUDA_BATCH, CPU_BATCH = 32, 8  # DERMLENS_MAX_BATCH of its own accord
SWITCH_S = 2.5e-3  # what OpenVINO takes to change the batch size, docs/performance.md


class Server(NamedTuple):
    name: str
    figures: str  # where they come from
    price: float  # USD an hour
    max_batch: int
    service_s: Callable[[int], float]
    switch_s: float = 0  # more for a batch of another size than the last
    most_per_s: float = math.inf  # beside the device, such as one process can take in

    @property
    def best_per_s(self) -> float:
        """With full batches alone, which need no change of size."""
        return min(self.max_batch / self.service_s(self.max_batch), self.most_per_s)


class Plan(NamedTuple):
    server: Server
    per_s: float  # that it is held at
    found: Outcome  # there


def measured_cpu(precision: str, *, price: float) -> Server:
    """Two cores, from the engine's times and the saturation of the server that were measured on one machine."""
    engines = json.loads((RESULTS / "engine.json").read_text())
    growth = json.loads((RESULTS / "growth.json").read_text())
    if engines["machine"] != growth["machine"]:
        raise ValueError("engine.json and growth.json are of two machines: run `make bench`")

    def times(of: str) -> dict[int, float]:
        rows = [row for row in engines["engines"] if (row["engine"], row["precision"]) == ("openvino", of)]
        return {row["batch"]: row["ms"] / 1000 for row in rows}

    # The server that was loaded ran in bfloat16; what an image costs beside its forward pass does not depend on that
    beside_s = 1 / max(row["per_s"] for row in growth["clients"]) - times("bfloat16")[CPU_BATCH] / CPU_BATCH
    table = times(precision)
    return Server(
        name=f"2 cores with AMX, {precision}",
        figures="measured" if precision == "bfloat16" else "forward pass measured, the rest from bfloat16",
        price=price,
        max_batch=CPU_BATCH,
        service_s=lambda batch: float(np.interp(batch, list(table), list(table.values()))) + batch * beside_s,
        switch_s=SWITCH_S,
    )


def paper_gpu(name: str, *, price: float, most_per_s: float) -> Server:
    return Server(
        name=name,
        figures="**on paper, not measured**",
        price=price,
        max_batch=CUDA_BATCH,
        service_s=lambda batch: H100_BATCH_S + batch * H100_IMAGE_S,
        most_per_s=most_per_s,
    )


def servers(*, cpu_price: float, gpu_price: float) -> list[Server]:
    return [
        measured_cpu("bfloat16", price=cpu_price),
        measured_cpu("int8", price=cpu_price),
        paper_gpu("H100, one server process", price=gpu_price, most_per_s=1 / PROCESS_S),
        paper_gpu("H100, were it fed", price=gpu_price, most_per_s=math.inf),
    ]


def under(server: Server, per_s: float) -> Outcome:
    """A load of so many requests a second on one server, simulated."""
    source = random.Random(0)  # noqa: S311 - a simulation, not a secret
    came = list(islice(arrivals(per_s, math.inf, source), ARRIVALS))
    last = server.max_batch

    def service_s(batch: int, _: int) -> float:
        nonlocal last
        switch_s, last = (0 if batch == last else server.switch_s), batch
        return server.service_s(batch) + switch_s

    return outcome(simulate(came, service_s, max_batch=server.max_batch), seconds=came[-1])


def plan(server: Server) -> Plan:
    """The most that a server may be held at, in steps of a twentieth of its best."""
    for step in count():
        per_s = (HEADROOM - 0.05 * step) * server.best_per_s
        found = under(server, per_s)
        if found.p99_ms <= P99_MS and found.refused <= REFUSED:
            return Plan(server, per_s, found)
    raise AssertionError


def replicas(per_s: float, demand_per_s: float) -> int:
    """What a demand needs, and one more."""
    return math.ceil(demand_per_s / per_s) + 1


def cost(price: float, per_s: float) -> float:
    """USD for a million images."""
    return price / 3600 / per_s * 1e6


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def tables(found: Sequence[Server]) -> str:
    """What each kind of server makes of each demand, and what the first one does as its load grows."""
    demands = [f"{demand:,} a second" for demand in DEMANDS_PER_S]
    head = ("server", "figures", "USD/h", "best, 1/s", "held at, 1/s", "p50 ms", "p99 ms", "USD a million", *demands)
    lines = [row(*head), row(*["---"] * len(head))]
    for made in map(plan, found):
        server = made.server
        needs = [replicas(made.per_s, demand) for demand in DEMANDS_PER_S]
        costs = [cost(need * server.price, demand) for need, demand in zip(needs, DEMANDS_PER_S, strict=True)]
        lines.append(
            row(
                server.name,
                server.figures,
                f"{server.price:.2f}",
                f"{server.best_per_s:,.0f}",
                f"{made.per_s:,.0f}",
                *((ms(made.found.p50_ms), ms(made.found.p99_ms)) if server.switch_s else ("–", "–")),
                f"{cost(server.price, made.per_s):.2f}",
                *(f"{need:,} ({usd:.2f})" for need, usd in zip(needs, costs, strict=True)),
            )
        )
    lines += ["", row("offered, of its best", "answered, 1/s", "p50 ms", "p99 ms", "503"), row(*["---"] * 5)]
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 2.0):
        seen = under(found[0], share * found[0].best_per_s)
        lines.append(row(f"{share:.0%}", f"{seen.per_s:.0f}", ms(seen.p50_ms), ms(seen.p99_ms), f"{seen.refused:.0%}"))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-price", type=float, default=CPU_PRICE, help="USD an hour for two cores (assumed)")
    parser.add_argument("--gpu-price", type=float, default=GPU_PRICE, help="USD an hour for an H100 (assumed)")
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args()
    made = tables(servers(cpu_price=options.cpu_price, gpu_price=options.gpu_price))
    print(made)
    if options.write:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + made + MARKS[1] + rest.split(MARKS[1])[1])
        print(f"done: {PAGE}")


if __name__ == "__main__":
    main()
