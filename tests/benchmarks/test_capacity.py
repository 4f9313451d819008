"""The capacity model: its arithmetic, its limits, and that docs/scaling.md shows what it gives."""

import json
from pathlib import Path

import pytest
from capacity import CPU_PRICE, GPU_PRICE, HEADROOM, MARKS, P99_MS, PAGE, Server, cost, plan, replicas, servers, tables


def server(service_s: float, **changes: float) -> Server:
    return Server("x", "made up", price=1.0, max_batch=1, service_s=lambda _: service_s, **changes)


def test_the_page_shows_what_the_command_gives() -> None:
    shown = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert shown == tables(servers(cpu_price=CPU_PRICE, gpu_price=GPU_PRICE))


def test_a_demand_gets_the_servers_it_needs_and_one_more() -> None:
    assert [replicas(100, demand) for demand in (1, 100, 101, 1000)] == [2, 2, 3, 11]
    assert cost(3.6, 1000) == pytest.approx(1)  # an hour at 1,000 a second is 3.6 million


def test_a_quick_server_is_held_at_its_headroom_and_a_slow_one_below() -> None:
    quick, slow = plan(server(0.01)), plan(server(0.1))
    assert quick.per_s == pytest.approx(HEADROOM * 100)
    assert slow.per_s < HEADROOM * 10
    assert slow.found.p99_ms <= P99_MS


def test_a_process_that_takes_in_less_than_its_device_can_do_is_the_limit() -> None:
    assert server(0.001, most_per_s=50).best_per_s == 50


def test_a_change_of_batch_size_makes_a_server_slower() -> None:
    plain, switching = (plan(Server("x", "", 1, 8, lambda b: 0.01 * b, switch_s)) for switch_s in (0, 0.005))
    assert switching.found.p50_ms > 1.2 * plain.found.p50_ms


def test_figures_of_two_machines_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, machine in (("engine.json", "one"), ("growth.json", "other")):
        (tmp_path / name).write_text(json.dumps({"machine": machine}))
    monkeypatch.setattr("capacity.RESULTS", tmp_path)
    with pytest.raises(ValueError, match="run `make bench`"):
        servers(cpu_price=1, gpu_price=1)
