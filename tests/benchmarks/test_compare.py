"""What the comparison makes of its figures; the servers themselves are run by `make bench-peers` alone."""

from typing import Any

from compare import PEERS, ROOT, RUNS, SCENARIOS, Figures, medians, ratios

SMALL, LARGE = SCENARIOS


def figures(small: float, large: float, **more: Any) -> Figures:
    def load(rate: float) -> Figures:
        return {"per_s": rate, "p50_ms": 10.0, "p99_ms": 1000 / rate, "failed": 0}

    return {SMALL: load(small), LARGE: load(large), "ready_s": 1.0, **more}


OURS = figures(
    100,
    50,
    **{
        "explain 224×224": {"per_s": 80.0},
        "one client /predict": {"p50_ms": 10.0},
        "one client /explain": {"p50_ms": 12.0},
        "open loop at 70%": {"p99_ms": 60.0, "mean_service_ms": 20.0},
    },
)


def test_each_ratio_is_against_the_best_peer_of_its_kind() -> None:
    found = {
        "dermlens": OURS,
        "plain-torch": figures(10, 20, **{"explain 224×224": {"per_s": 5.0}}),
        "litserve-torch": figures(20, 10),
        "plain-openvino": figures(50, 100),
        "ray-openvino": figures(25, 10),
    }
    answer = ratios(found, {"per_s": 125.0})
    assert answer[f"{SMALL}, against the best peer as its users write it (litserve-torch)"] == 5
    assert answer[f"{LARGE}, against the best peer as its users write it (plain-torch)"] == 2.5
    assert answer[f"{SMALL}, against the best peer with our engine inside (plain-openvino)"] == 2
    assert answer[f"{SMALL}, p99 over that of plain-openvino"] == 0.5
    assert answer["served over the bare engine loop"] == 0.8
    assert answer["explain over predict, median latency of one client"] == 1.2
    assert answer["explain, against captum behind plain FastAPI"] == 16
    assert answer["p99 at 70% load over the mean service time (decode and forward of the same requests)"] == 3


def test_medians_are_taken_number_by_number() -> None:
    rounds = [{"a": a, "load": {"per_s": 10 * a, "statuses": {"200": a}}} for a in (3, 1, 2)]
    found = medians(rounds)
    assert found["a"] == 2
    assert found["load"]["per_s"] == 20
    assert found["load"]["statuses"] == [{"200": 3}, {"200": 1}, {"200": 2}]


def test_every_peer_has_its_script_and_runs_with_both_engines() -> None:
    for name, peer in PEERS.items():
        if name != "dermlens":
            assert (ROOT / "benchmarks" / "peers" / peer.script).is_file()
            assert {f"{name}-torch", f"{name}-openvino"} <= set(RUNS)
