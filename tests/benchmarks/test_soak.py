"""What the soak sends and how it judges the answers; a few seconds of it against a real server at the end."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from overload import Vitals
from soak import Action, Outcome, Sample, Tally, bars_of, catalogue, explained, growth, mix, two_versions

from app.model import store
from tests.conftest import NAME, ROOT

PLAIN = Action("plain", b"")
HURRIED = Action("hurried", b"", frozenset({200, 504}))
WRONG = Action("wrong", b"", frozenset({400}))


def vitals(rss_mb: float = 100.0, *, fds: int = 10, threads: int = 5) -> Vitals:
    return Vitals(rss_mb, rss_mb, fds, threads, 1.0)


def samples(*rss_mb: float, every_s: float = 10.0) -> list[Sample]:
    return [Sample(n * every_s, vitals(mb), 0, {}, 1.0) for n, mb in enumerate(rss_mb)]


def outcome(**changes: Any) -> Outcome:
    tally = Tally(samples=samples(*[100.0] * 40), promoted=2, followed=2)
    tally.statuses.update({"200": 10, "503": 3, "504": 2})
    fields = {"warm_until": 100.0, "traffic_until": 390.0, "rested": [vitals(), vitals()], "exit_code": 0}
    for key in [key for key in changes if hasattr(tally, key)]:
        setattr(tally, key, changes.pop(key))
    return Outcome(tally, **(fields | changes))  # type: ignore[arg-type]


def missed(found: Outcome) -> list[str]:
    return [bar.measure for bar in bars_of(found) if not bar.met]


def test_the_mix_is_the_same_for_a_seed_and_another_for_another() -> None:
    actions = catalogue()

    def names(seed: str) -> list[str]:
        return [action.name for action in islice(mix(actions, seed), 300)]

    assert names("0 soak 1") == names("0 soak 1")
    assert names("0 soak 1") != names("0 soak 2")


def test_every_kind_of_request_comes_and_the_heavy_ones_come_more_often() -> None:
    actions = catalogue()
    names = [action.name for action in islice(mix(actions, "0"), 5000)]
    assert set(names) == {action.name for action in actions}
    assert names.count("jpeg") > 4 * names.count("/nowhere")


def test_the_catalogue_speaks_of_every_style_error_and_way_to_leave() -> None:
    actions = catalogue()
    assert len({action.name for action in actions}) == len(actions)
    assert {200, 400, 404, 405, 413, 415, 422, 504} == set().union(*(action.expected for action in actions))
    assert {action.leaves for action in actions} == {"", "upload", "waiting"}
    for style in ("overlay", "heatmap", "side-by-side"):
        assert any(f"style={style}".encode() in action.request for action in actions)


@pytest.mark.parametrize(
    ("action", "status", "retry_after", "burst", "due"),
    [
        (PLAIN, 200, False, False, True),
        (PLAIN, 503, True, True, True),
        (PLAIN, 503, False, True, False),  # no Retry-After
        (PLAIN, 503, True, False, False),  # no burst
        (PLAIN, 504, False, True, False),  # it had time
        (PLAIN, 500, False, True, False),
        (PLAIN, 0, False, True, False),  # lost
        (HURRIED, 504, False, False, True),
        (HURRIED, 503, True, False, True),
        (HURRIED, 502, True, True, False),
        (WRONG, 400, False, False, True),
        (WRONG, 200, False, False, False),
    ],
)
def test_a_5xx_is_explained_by_a_burst_or_a_deadline_alone(
    action: Action, status: int, retry_after: bool, burst: bool, due: bool
) -> None:
    assert explained(action, status, retry_after=retry_after, burst=burst) is due


def test_surprises_are_counted_by_kind_and_the_first_few_are_kept() -> None:
    tally = Tally()
    for status in (500, 200, 0, 404):
        tally.count(PLAIN, status, b"http/1.1\r\nx-model-version: 7\r\nretry-after: 1", burst=False)
    for _ in range(100):
        tally.count(PLAIN, 502, b"http/1.1 502", burst=True)
    assert (tally.bad_5xx, tally.other_surprises, tally.versions) == (101, 2, {"7"})
    assert tally.surprises[:2] == ["plain: 500, retry-after", "plain: lost, retry-after"]
    assert len(tally.surprises) == 20
    assert tally.statuses["lost"] == 1


def test_growth_is_from_the_first_minute_to_the_last_and_one_peak_is_none() -> None:
    grown = samples(*[500.0] * 10, *[100.0] * 6, *[900.0], *[100.0] * 20, *[110.0] * 7)
    assert growth(grown, 100.0, 430.0) == pytest.approx(0.1)
    assert growth(samples(*[100.0] * 3, 900, *[100.0] * 36), 0, 390) == 0
    assert growth([], 0, 100) != growth([], 0, 100)  # NaN


def test_an_outcome_within_its_bars_misses_none() -> None:
    assert missed(outcome()) == []


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        ({"samples": samples(*[100.0] * 20, *[102.1] * 20)}, "memory growth after the warm-up, %"),
        ({"samples": []}, "memory growth after the warm-up, %"),
        ({"rested": [vitals(), vitals(102.1)]}, "memory growth from one rest to the other, %"),
        ({"rested": [vitals(), vitals(fds=11)]}, "file descriptors more than after the warm-up, at rest"),
        ({"rested": [vitals(), vitals(threads=6)]}, "threads more than after the warm-up, at rest"),
        ({"bad_5xx": 1}, "unexplained 5xx"),
        ({"other_surprises": 1}, "other answers that were not due, lost ones among them"),
        ({"followed": 1}, "promotions that the server did not follow"),
        ({"exit_code": -9}, "exit code after SIGTERM"),
        ({"exit_code": 1}, "exit code after SIGTERM"),
    ],
)
def test_each_bar_can_be_missed_alone(changes: dict[str, Any], measure: str) -> None:
    assert missed(outcome(**changes)) == [measure]


@pytest.mark.parametrize("status", ["200", "503", "504"])
def test_a_soak_that_did_not_bring_the_server_to_it_proves_nothing(status: str) -> None:
    found = outcome()
    del found.tally.statuses[status]
    assert len(missed(found)) == 1


def test_the_store_of_the_soak_has_the_served_version_twice(careful_store: Path, tmp_path: Path) -> None:
    two_versions(careful_store, tmp_path)
    assert store.versions(tmp_path, NAME) == ["1", "2"]
    assert store.current(tmp_path, NAME) == "1"
    first, second = (store.verify(tmp_path, NAME, version) for version in ("1", "2"))
    assert first.files == second.files


def test_a_few_seconds_of_soak_end_with_a_table_a_file_and_a_verdict(careful_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    short = ["--minutes", "0.08", "--every", "0.3", "--rest", "0.5", "--reload", "1.2", "--burst", "0.8"]
    command = [sys.executable, "benchmarks/soak.py", *short, "--store", str(careful_store), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    result = json.loads(out.read_text())
    found = {bar["measure"]: bar for bar in result["bars"]}
    assert result["surprises"] == [], done.stdout
    for measure in ("unexplained 5xx", "requests answered with 200", "exit code after SIGTERM"):
        assert found[measure]["met"], done.stdout
    assert result["statuses"]["left"] > 0
    assert result["promoted"] >= 1
    assert out.with_suffix(".png").stat().st_size > 1000
    missing = [bar["measure"] for bar in result["bars"] if not bar["met"]]
    assert done.returncode == (1 if missing else 0)
    assert all(measure in done.stdout for measure in missing)
