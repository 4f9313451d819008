"""What the flood counts, and what it says of it; one short flood of a real server at the end."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from load import Target
from overload import LOST, Answer, Bar, Flood, Round, bars_of, save, spread_ms, tell, vitals

from tests.benchmarks.test_load import answering, read_request, serve_and
from tests.conftest import ROOT

REQUEST = b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\nContent-Length: 4\r\n\r\nbusy"


def answer(status: int, *, at: float = 0.0, seconds: float = 0.01, retry_after: bool = True) -> Answer:
    return Answer(100 + at, seconds, status, retry_after)


def summary_of(*answers: Answer, seconds: float = 10, **lost: int) -> dict[str, Any]:
    return Round(seconds, 100.0, answers, lost, [0.0] * (len(answers) + sum(lost.values()))).summary()


def good_round() -> dict[str, Any]:
    answered = [answer(200, at=n / 10, seconds=1) for n in range(90)]
    return summary_of(*answered, *[answer(503) for _ in range(910)])


def missed(rounds: list[dict[str, Any]], saturations: tuple[float, ...] = (10.0,), times: float = 10) -> list[str]:
    return [bar.measure for bar in bars_of(rounds, saturations, times=times) if not bar.met]


def test_a_round_within_its_bars_misses_none() -> None:
    assert missed([good_round()], saturations=(9.0,)) == []


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"goodput_per_s": 8.9}, "goodput over saturation"),
        ({"refused_ms": {"p99": 51.0}}, "p99 of a 503, ms"),
        ({"refused_ms": {"p99": math.nan}}, "p99 of a 503, ms"),
        ({"accepted_ms": {"p99": 5001.0}}, "p99 of what was accepted, ms"),
        ({"without_retry_after": 1}, "503 without Retry-After"),
        ({"other": 1}, "answers other than 200, 503, 504"),
        ({"lost": {"reset": 1}}, "lost: connect, reset, no connection, no answer"),
        ({"offered_per_s": 50.0}, "offered over saturation"),
    ],
)
def test_each_bar_can_be_missed_alone(change: Mapping[str, Any], measure: str) -> None:
    assert missed([good_round() | {"goodput_per_s": 9.5, **change}]) == [measure]


def test_one_bad_round_of_three_does_not_change_a_median_but_does_change_a_sum() -> None:
    slow = good_round() | {"goodput_per_s": 1.0, "lost": {"reset": 1}}
    assert missed([good_round(), slow, good_round()], saturations=(9.0, 9.0, 90.0)) == [
        "lost: connect, reset, no connection, no answer"
    ]


def test_only_answers_within_deadline_and_within_the_flood_are_goodput() -> None:
    found = summary_of(
        answer(200, at=1),
        answer(200, at=1, seconds=5.1),  # too late for its client
        answer(200, at=9.5, seconds=1),  # after the flood
        answer(503, at=1),
    )
    assert found["goodput_per_s"] == 1 / 10
    assert found["share"] == {"200": 3 / 4, "503": 1 / 4}


def test_a_deadline_told_with_504_counts_as_accepted_and_late() -> None:
    assert summary_of(answer(200, seconds=0.1), answer(504, seconds=5.5))["accepted_ms"]["max"] == pytest.approx(5500)


def test_a_503_without_retry_after_and_an_unforeseen_status_are_counted() -> None:
    found = summary_of(answer(503, retry_after=False), answer(503), answer(500), answer(LOST), reset=1)
    assert (found["without_retry_after"], found["other"], found["lost"]) == (1, 1, {"reset": 1})
    assert "0" not in found["share"]


def test_percentiles_are_in_milliseconds_and_of_nothing_are_nan() -> None:
    assert spread_ms([0.001, 0.002, 0.009]) == pytest.approx({"median": 2, "p99": 8.86, "max": 9})
    assert all(math.isnan(value) for value in spread_ms([]).values())


def test_the_plot_shows_each_second_apart() -> None:
    found = Round(3, 100.0, [answer(200, at=0.1), answer(503, at=2.5, seconds=0.02)], {}, [0.0, 0.0]).by_second()
    assert found["offered"] == [1, 0, 1]
    assert found["200"] == [1, 0, 0]
    assert found["503"] == [0, 0, 1]
    assert found["503 median ms"][2] == pytest.approx(20)


def test_the_table_says_which_bar_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Bar("good", 1, 1), Bar("bad", math.nan, 1)
    assert tell([good]) == 0
    assert tell([good, bad]) == 1
    assert "missed: bad" in capsys.readouterr().out


def test_what_is_saved_is_json_that_others_can_read(tmp_path: Path) -> None:
    save({"a": math.nan, "b": [1.5]}, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": None, "b": [1.5]}


def test_vitals_are_those_of_the_whole_session() -> None:
    program = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    alone = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    both = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        while vitals(both.pid).threads < 2:
            pass
        assert vitals(alone.pid).threads == 1
        assert vitals(both.pid).rss_mb > vitals(alone.pid).rss_mb / 2 > 0
        assert vitals(both.pid).fds >= 6
    finally:
        for process in (alone, both):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_flood_does_not_wait_for_answers_and_uses_its_connections_again() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answering(BUSY, pieces=3)(reader, writer)

    async def use(port: int) -> None:
        flood = Flood(Target("127.0.0.1", port, [REQUEST]))
        await flood.offer(rate=600, seconds=1, seed=1)
        assert 450 <= len(flood.answers) == flood.sent == len(flood.lags) <= 750
        assert {(a.status, a.retry_after) for a in flood.answers} == {(503, True)}
        assert sum(flood.lost.values()) == 0
        assert connections < len(flood.answers)

    serve_and(handler, use)


def test_a_broken_connection_and_a_refused_one_are_losses_not_answers() -> None:
    async def handler(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async def use(port: int) -> None:
        flood = Flood(Target("127.0.0.1", port, [REQUEST]))
        await flood.offer(rate=50, seconds=0.5, seed=1)
        assert flood.lost["reset"] == flood.sent > 5
        assert {a.status for a in flood.answers} == {LOST}
        nobody = Flood(Target("127.0.0.1", 1, [REQUEST]))
        await nobody.offer(rate=50, seconds=0.5, seed=1)
        assert nobody.lost["connect"] > 5
        assert nobody.answers == []

    serve_and(handler, use)


def test_a_short_flood_of_a_real_server_ends_with_a_table_a_file_and_a_verdict(
    careful_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    monkeypatch.setenv("DERMLENS_MAX_QUEUE", "2")
    out = tmp_path / "overload.json"
    short = ["--rounds", "1", "--seconds", "1", "--warm", "3", "--times", "40"]
    command = [sys.executable, "benchmarks/overload.py", *short, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    result = json.loads(out.read_text())
    (figures,) = result["rounds"]
    assert figures["share"]["200"] > 0
    assert figures["share"]["503"] > 0
    assert figures["without_retry_after"] == figures["other"] == 0
    assert figures["rss_after_mb"] > 50
    assert out.with_suffix(".png").stat().st_size > 1000
    missing = [bar["measure"] for bar in result["bars"] if not bar["met"]]
    assert done.returncode == (1 if missing else 0)
    assert all(measure in done.stdout for measure in missing)
