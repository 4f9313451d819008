import asyncio
import json
import logging
import os
import pty
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal

import pytest

from app import logs
from tests.conftest import ROOT

LOG = logging.getLogger("app.test")
Configured = Callable[..., "Stderr"]


class Stderr:
    """The standard error of a configured process: a pipe that is read only when asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, write = os.pipe()
        monkeypatch.setattr(sys, "stderr", os.fdopen(write, "w"))

    def text(self) -> str:
        """All that was written; ends the pipe."""
        for handler in logging.getLogger().handlers:
            handler.flush()
        sys.stderr.close()
        with os.fdopen(self.read) as pipe:
            return pipe.read()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]

    def line(self) -> dict[str, Any]:
        [line] = self.lines()
        return line


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configured]:
    """`configured("info")` gives the process's stderr; logging is put back afterwards."""
    loggers = [logging.getLogger(name) for name in (None, "app", "uvicorn", "uvicorn.error")]
    before = [(logger, logger.level, logger.handlers) for logger in loggers]
    for where, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(where, name, getattr(where, name))

    def configure(level: str = "info", format: Literal["auto", "json", "text"] = "json") -> Stderr:
        stderr = Stderr(monkeypatch)
        logs.configure(level, format)
        return stderr

    yield configure
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


def failing(message: str) -> Exception:
    secret = message  # a local variable
    try:
        dict[str, int]().pop(secret)
    except KeyError as cause:
        try:
            raise ValueError(secret) from cause
        except ValueError as error:
            return error
    raise AssertionError


def test_a_record_is_one_json_object_with_time_level_logger_and_event(configured: Configured) -> None:
    stderr = configured()
    LOG.warning("version %s promoted", "3", extra={"version": "3"})
    line = stderr.line()
    assert line.pop("timestamp").endswith("Z")
    assert line == {"level": "warning", "logger": "app.test", "event": "version 3 promoted", "version": "3"}


def test_the_time_is_utc_with_milliseconds(configured: Configured) -> None:
    stderr = configured()
    record = LOG.makeRecord("app.test", logging.INFO, "", 0, "then", (), None)
    record.created = 1_000_000_000.25
    LOG.handle(record)
    assert stderr.line()["timestamp"] == "2001-09-09T01:46:40.250Z"


def test_the_access_line_has_what_was_noted_on_the_way_from_any_task_or_thread(configured: Configured) -> None:
    stderr = configured()

    async def one(n: int) -> None:
        await asyncio.to_thread(logs.note_stage, "decode", n / 1000)

    async def answer(request_id: str, images: int) -> None:
        logs.begin(request_id)
        logs.note(bytes_in=images, key="clinic")
        await asyncio.gather(*(one(n) for n in range(images, 0, -1)))
        LOG.info("midway")
        logs.access(method="POST", route="/predict/batch", status=200, seconds=0.0123456)

    async def answer_two() -> None:
        await asyncio.gather(answer("a", 3), answer("b", 5))

    asyncio.run(answer_two())
    lines = stderr.lines()
    assert sorted(line["request_id"] for line in lines if line["event"] == "midway") == ["a", "b"]
    [a, b] = sorted((line for line in lines if line["event"] == "request"), key=lambda line: str(line["request_id"]))
    del a["timestamp"]
    assert a == {
        "level": "info",
        "logger": "app.access",
        "event": "request",
        "request_id": "a",
        "method": "POST",
        "route": "/predict/batch",
        "status": 200,
        "duration_ms": 12.35,
        "bytes_in": 3,
        "key": "clinic",
        "decode_ms": 3.0,  # of the slowest image
    }
    assert (b["bytes_in"], b["decode_ms"]) == (5, 5.0)


@pytest.mark.parametrize(("level", "seen"), [("info", ["/predict"]), ("debug", ["/readyz", "/metrics", "/predict"])])
def test_what_machines_ask_for_all_day_is_logged_at_debug(configured: Configured, level: str, seen: list[str]) -> None:
    stderr = configured(level)
    for route in ("/readyz", "/metrics", "/predict"):
        logs.access(method="GET", route=route, status=200, seconds=0)
    assert [line["route"] for line in stderr.lines()] == seen


def test_noting_outside_a_request_is_no_error(configured: Configured) -> None:
    stderr = configured()

    def note() -> None:
        logs.note(key="clinic")
        logs.note_stage("decode", 1)
        LOG.info("started")

    copy_context().run(note)
    assert "key" not in stderr.line()


def test_an_exception_is_told_by_kind_and_place_and_never_by_what_it_says(configured: Configured) -> None:
    stderr = configured()
    LOG.error("failed", exc_info=failing("Jane Doe"))
    text = stderr.text()
    assert "Jane Doe" not in text
    exception = json.loads(text)["exception"]
    assert exception[0] == "builtins.ValueError"
    assert exception[2] == "builtins.KeyError"
    for place in (exception[1], exception[3]):
        assert place.startswith(f"  {__file__}:")
        assert place.endswith(" in failing")


def test_the_errors_of_the_system_and_of_an_engine_say_what_happened(configured: Configured) -> None:
    stderr = configured()
    within: dict[str, Any] = {}
    code = compile("def run(): raise RuntimeError('out of memory')", "/x/app/engines/cuda_engine.py", "exec")
    exec(code, within)  # noqa: S102 - a frame of an engine
    for work in (within["run"], lambda: open("/Jane Doe")):  # noqa: SIM115
        try:
            work()
        except (OSError, RuntimeError) as error:
            LOG.error("failed", exc_info=error)
    text = stderr.text()
    told = [json.loads(line)["exception"][0] for line in text.splitlines()]
    assert told == ["builtins.RuntimeError: out of memory", "builtins.FileNotFoundError: No such file or directory"]
    assert "Jane Doe" not in text


def test_every_error_of_a_group_and_every_cause_is_told_and_a_ring_of_causes_ends(configured: Configured) -> None:
    stderr = configured()
    one, other = TypeError(), LookupError()
    one.__cause__, other.__cause__ = other, one
    LOG.error("failed", exc_info=ExceptionGroup("Jane Doe", [one, OverflowError()]))
    kinds = stderr.line()["exception"]
    assert {"builtins.ExceptionGroup", "builtins.TypeError", "builtins.LookupError", "builtins.OverflowError"} == set(
        kinds
    )


def test_crashes_of_the_process_and_its_threads_are_lines_too(configured: Configured) -> None:
    stderr = configured()
    error = failing("Jane Doe")
    sys.excepthook(type(error), error, error.__traceback__)
    thread = threading.Thread(target=failing_at_once)
    thread.start()
    thread.join()
    Unhappy()  # and forgotten at once
    lines = [(line["level"], line["event"], line["exception"][0]) for line in stderr.lines()]
    assert ("critical", "crashed", "builtins.ValueError") in lines
    assert ("error", "a thread crashed", "builtins.ValueError") in lines
    assert ("error", "an error nobody could catch", "builtins.ValueError") in lines


def failing_at_once() -> None:
    raise ValueError("Jane Doe")


class Unhappy:
    def __del__(self) -> None:
        failing_at_once()


def test_libraries_log_from_warning_on_and_only_their_templates(configured: Configured) -> None:
    stderr = configured("debug")
    library = logging.getLogger("PIL.TiffImagePlugin")
    library.debug("tag: ImageDescription - value: Jane Doe")
    library.info("Jane Doe")
    library.warning("Unknown tag: %r\nand Jane Doe", "Jane Doe", extra={"value": "Jane Doe"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest shows them elsewhere
        warnings.warn("Jane Doe", RuntimeWarning, stacklevel=1)
    logging.getLogger("uvicorn.error").info('%s - "WebSocket %s" 403', "::1", "/?name=Jane Doe")
    text = stderr.text()
    assert "Jane" not in text
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert events[0] == "Unknown tag: %r"
    assert events[1].startswith(__file__)
    assert events[1].endswith(": RuntimeWarning")
    assert events[2] == '%s - "WebSocket %s" 403'
    assert len(events) == 3


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize("character", list("\n\r\0\x1b\x7f\x85\x9b\u2028\u202e\udcff"), ids=ascii)
def test_a_value_cannot_forge_a_line_or_steer_a_terminal(
    configured: Configured, format: Literal["json", "text"], character: str
) -> None:
    stderr = configured("info", format)
    LOG.info("ok%sforged", character, extra={"value": f"ok{character}forged"})
    text = stderr.text()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].isprintable()


def test_text_is_for_people(configured: Configured) -> None:
    stderr = configured("info", "text")
    logs.begin("r1")
    LOG.error("the model failed", exc_info=failing("Jane Doe"), extra={"version": "3", "key": "front desk"})
    first, *rest = stderr.text().splitlines()
    assert first.endswith("Z error    the model failed logger=app.test request_id=r1 version=3 key='front desk'")
    assert rest[0] == "builtins.ValueError"
    assert "Jane" not in str(rest)


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("terminal", "chosen", "starts"), [(False, "auto", b"{"), (True, "auto", b"2"), (True, "json", b"{")]
)
def test_a_pipe_gets_json_and_a_terminal_text(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, chosen: Any, starts: bytes
) -> None:
    read, write = pty.openpty() if terminal else os.pipe()
    monkeypatch.setattr(sys, "stderr", os.fdopen(write, "w"))
    logs.configure("info", chosen)
    LOG.info("hello")
    assert os.read(read, 1000).startswith(starts)
    sys.stderr.close()
    os.close(read)


def test_a_reader_that_stalls_holds_nothing_up_and_is_told_what_it_missed(configured: Configured) -> None:
    stderr = configured()
    total = logs.MAX_WAITING + 5000
    for n in range(total):  # a pipe holds some hundred lines
        LOG.info("event", extra={"n": n})
    told, arrived = 0, 0
    with os.fdopen(os.dup(stderr.read)) as pipe:
        while told + arrived < total:
            line = json.loads(pipe.readline())
            told += line.get("lost", 0)
            arrived += "n" in line
    assert told > 1000
    assert told + arrived == total


@pytest.mark.parametrize("descriptor", ["closed pipe", "/dev/full"])
def test_where_nothing_can_be_written_work_goes_on(descriptor: str) -> None:
    code = """
        import logging
        from app import logs
        logs.configure("info", "json")
        for n in range(100):
            logs.access(method="GET", route="/predict", status=200, seconds=0)
        print("done")
    """
    read, write = os.pipe()
    os.close(read)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=full if descriptor == "/dev/full" else write,
            check=False,
        )
    os.close(write)
    assert done.stdout == b"done\n"


def test_a_record_that_cannot_be_formatted_fails_nobody(configured: Configured) -> None:
    stderr = configured()
    LOG.info("%d images", "many")
    LOG.info("after")
    lines = stderr.lines()
    assert [line["event"] for line in lines] == ["after", "log lines were lost"]


def test_the_last_lines_are_written_when_the_process_ends() -> None:
    code = """
        import logging
        from app import logs
        logs.configure("info", "auto")
        for n in range(1000):
            logging.getLogger("app.x").info("event")
        raise SystemExit
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len([json.loads(line) for line in done.stderr.splitlines()]) == 1000
