"""Structured logs on stderr: one JSON object a line, or a line for people; nothing of an upload is in them."""

import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from structlog.processors import JSONRenderer
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.typing import EventDict, Processor

MAX_WAITING = 10_000  # lines, some 4 MB, before a reader that stalls loses any
# Machines ask for them all day
QUIET = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}/ready")
LOG = logging.getLogger(__name__)
ACCESS = logging.getLogger("app.access")
_EXTRA = ExtraAdder()

_line: ContextVar[dict[str, Any]] = ContextVar("line")  # what the access line of this request will say


def configure(level: str, format: Literal["auto", "json", "text"]) -> None:
    """Send every log, warning and crash of the process to stderr.

    Start uvicorn with `log_config=None, access_log=False`: its loggers end here, and the access line is our own.

    Args:
        level: of `app` and uvicorn, such as "info". Libraries stay at warning: below it Pillow logs the EXIF it reads.
        format: `auto` is text where stderr is a terminal, else JSON.
    """
    as_text = format == "text" or (format == "auto" and sys.stderr.isatty())
    render: Processor = _as_text if as_text else JSONRenderer()
    handler = _Writer(sys.stderr.fileno())
    handler.setFormatter(ProcessorFormatter(processors=[_add_fields, _describe, render]))
    number = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(number, logging.WARNING))
    for name in ("app", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(number)
        logger.handlers, logger.propagate = [], True  # uvicorn's own set-up, where it ran before
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # tells of every broken form, with bytes of it
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: LOG.critical("crashed", exc_info=(kind, error, trace))
    threading.excepthook = lambda crash: LOG.error("a thread crashed", exc_info=crash.exc_value)
    sys.unraisablehook = lambda crash: LOG.error("an error nobody could catch", exc_info=crash.exc_value)


def begin(request_id: str) -> None:
    """Start the access line of the request that this task answers; its other lines carry the id too."""
    _line.set({"request_id": request_id})


def note(**fields: Any) -> None:
    """Add to this request's access line, from any task or thread that works for it; never data of the upload."""
    _line.get({}).update(fields)


def note_stage(stage: str, seconds: float) -> None:
    """Add a stage's duration to this request's access line; of several images the slowest counts."""
    line, field = _line.get({}), f"{stage}_ms"
    line[field] = max(line.get(field, 0.0), round(seconds * 1000, 2))


def access(*, method: str, route: str, status: int, seconds: float) -> None:
    """Write this request's access line; `route` is the template, since paths and queries may hold anything."""
    facts = {"method": method, "route": route, "status": status, "duration_ms": round(seconds * 1000, 2)}
    ACCESS.log(logging.DEBUG if route in QUIET else logging.INFO, "request", extra=facts | _line.get({}))


class _Writer(logging.Handler):
    """Writes from a thread of its own: a full pipe or disk stalls that thread and loses lines, never a request."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(MAX_WAITING)
        self._lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except Exception:  # no room, or a value that cannot be shown
            self._lost += 1

    def flush(self) -> None:
        """Wait until all is written, a second at most; `logging.shutdown` calls it when the process ends."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, timeout=1)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._put(line)
                if lost := self._lost:
                    fields = {"name": LOG.name, "levelno": logging.WARNING, "levelname": "WARNING", "lost": lost}
                    self._put(self.format(logging.makeLogRecord(fields | {"msg": "log lines were lost"})) + "\n")
                    self._lost -= lost
            except OSError:
                self._lost += 1
            finally:
                self._lines.task_done()

    def _put(self, text: str) -> None:
        rest = text.encode(errors="backslashreplace")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def _add_fields(logger: Any, name: str, event: EventDict) -> EventDict:
    """The `extra` of our own records; those of libraries may hold anything."""
    ours = event["_record"].name.startswith("app.")
    return _EXTRA(logger, name, event) if ours else event


def _describe(_: Any, __: str, event: EventDict) -> EventDict:
    """When, how grave, whose and what, then the record's own fields."""
    record: logging.LogRecord = event.pop("_record")
    error = event.pop("exc_info", None)
    del event["_from_structlog"]
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    described = {
        "timestamp": moment.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _safe_message(record, event.pop("event")),
        "request_id": _line.get({}).get("request_id"),
        **event,
        "exception": list(_trace(error[1])) if error else None,
    }
    return {field: value for field, value in described.items() if value is not None}


def _safe_message(record: logging.LogRecord, message: str) -> str:
    """The message where its author never sees a request, else what of it holds no data."""
    before_requests = record.name == "uvicorn.error" and record.module in ("server", "on")
    if before_requests or record.name.startswith("app."):
        return message
    if record.name == "py.warnings":
        return ": ".join(message.split(": ", 2)[:2])  # place and category
    return str(record.msg).partition("\n")[0]  # the template without its arguments


def _trace(error: BaseException | None, depth: int = 0) -> Iterator[str]:
    """Kind and places of an exception and its causes: no source, no local variables, and few messages.

    Messages may quote the upload. Told are the system's own (OSError), and those from within an engine, which sees no
    more of an upload than its pixels and says shapes and devices.
    """
    if error is None or depth == 8:
        return
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    told = ""
    if isinstance(error, OSError) and error.errno:
        told = f": {os.strerror(error.errno)}"
    elif any("/app/engines/" in code.co_filename for code, _ in frames):
        told = f": {str(error)[:500]}"
    yield f"{type(error).__module__}.{type(error).__qualname__}{told}"
    for code, line in frames:
        yield f"  {code.co_filename}:{line} in {code.co_qualname}"
    grouped = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for cause in (*grouped, error.__cause__ or (None if error.__suppress_context__ else error.__context__)):
        yield from _trace(cause, depth + 1)


def _as_text(_: Any, __: str, event: EventDict) -> str:
    """`time level event field=value …`, and an exception on lines of its own."""
    head = f"{event.pop('timestamp')} {event.pop('level'):<8} {_plain(event.pop('event'))}"
    trace = event.pop("exception", [])
    fields = (f"{name}={_plain(str(value), ' ')}" for name, value in event.items())
    return "\n".join([" ".join([head, *fields]), *map(_plain, trace)])


def _plain(text: str, apart: str = "\n") -> str:
    """Text that cannot end a line or steer a terminal; quoted also where it holds what keeps fields apart."""
    return text if text.isprintable() and apart not in text else ascii(text)
