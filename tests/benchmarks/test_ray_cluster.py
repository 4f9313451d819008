"""When the clients of the Ray run try again, and how it is judged; the cluster is started by its own command alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from overload import LOST
from ray_cluster import AGAIN_S, PLANNED, UNPLANNED, Tally, ask, bars_of, wait_before_retry

from tests.benchmarks.test_load import read_request, serve_and, target

PLAIN = b"http/1.1 500 \r\ncontent-type: text/plain; charset=utf-8\r\n"
PROBLEM = b"http/1.1 500 \r\ncontent-type: application/problem+json\r\n"


@pytest.mark.parametrize(
    ("status", "head", "seconds"),
    [
        (200, b"", None),
        (LOST, b"", AGAIN_S),
        (503, b"http/1.1 503 \r\nretry-after: 7\r\n", 7),
        (429, b"http/1.1 429 \r\nretry-after: 2\r\n", 2),
        (503, PLAIN, AGAIN_S),
        (500, PLAIN, AGAIN_S),  # the proxy's, whose replica is gone
        (408, PLAIN, AGAIN_S),
        (500, PROBLEM, None),  # the app's own
        (408, PROBLEM, None),
        (504, PROBLEM, None),
        (400, PROBLEM, None),
    ],
)
def test_what_is_not_the_apps_final_word_is_tried_again(status: int, head: bytes, seconds: float | None) -> None:
    assert wait_before_retry(status, head) == seconds


def served(answers: list[bytes]) -> Tally:
    """What one request meets on a server that gives these answers in turn; an empty one breaks the connection."""
    tally = Tally()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            writer.write(text := answers.pop(0))
            if not text or b"connection: close" in text:
                return

    async def use(port: int) -> None:
        if connection := await ask(target(port), None, target(port).requests[0], tally):
            connection.close()

    serve_and(handler, use)
    return tally


def answer(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} x", *headers, "content-length: 0", "", ""]).encode()


def test_a_request_is_answered_in_the_end_and_its_tries_are_counted() -> None:
    gone = answer("500", "content-type: text/plain", "connection: close")
    busy = answer("503", "retry-after: 0")
    tally = served([b"", gone, busy, answer("200", "x-model-version: 4")])
    assert (tally.answered, tally.failed) == (1, {})
    assert tally.retried == {"connection": 1, "500": 1, "503": 1}
    assert tally.versions == {"4": 1}


def test_a_final_error_is_a_failed_request() -> None:
    tally = served([answer("500", "content-type: application/problem+json")])
    assert (tally.answered, tally.failed, tally.retried) == (0, {"500": 1}, {})


def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_cluster.GIVE_UP_S", 0.3)
    tally = served([answer("503", "retry-after: 1")])
    assert (tally.answered, tally.failed) == (0, {"503": 1})


def outcome(change: Callable[[dict[str, Any]], None] = lambda _: None) -> list[str]:
    """The bars that are missed after a change to a run where all went well."""
    found: dict[str, Any] = {phase: {"failed": {}, "retried": {}, "answered": 99} for phase in (*UNPLANNED, *PLANNED)}
    found[PLANNED[1]]["versions_after"] = ["4", "4"]
    found["files spilled"] = 0
    change(found)
    return [bar.measure for bar in bars_of(found, versions=["4", "5"]) if not bar.met]


def test_failed_requests_miss_a_bar_in_every_phase_and_tries_in_planned_ones() -> None:
    assert outcome() == []
    for phase in (*UNPLANNED, *PLANNED):
        assert outcome(lambda found, p=phase: found[p]["failed"].update({"500": 1})) == [f"{phase}: requests failed"]  # type: ignore[misc]
    assert outcome(lambda found: found["a replica killed"]["retried"].update({"500": 3})) == []
    assert len(outcome(lambda found: found["a version promoted"]["retried"].update({"500": 3}))) == 1


def test_a_phase_without_traffic_a_version_that_stayed_and_a_file_on_disk_miss_a_bar() -> None:
    assert len(outcome(lambda found: found["a replica killed"].update(answered=0))) == 1
    assert len(outcome(lambda found: found[PLANNED[1]].update(versions_after=["4", "5"]))) == 1
    assert len(outcome(lambda found: found.update({"files spilled": 1}))) == 1
