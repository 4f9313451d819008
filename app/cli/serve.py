"""dermlens serve"""

import argparse
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from app import logs, memory
from app.cli import check
from app.main import create_app
from app.protocol import GuardedProtocol
from app.settings import Settings, unknown_variables

LOG = logging.getLogger(__name__)
FAILED = 70  # EX_SOFTWARE of sysexits.h: the device is lost or stuck, start the server again


def add(commands: Any) -> None:
    """Add `serve`."""
    serve = commands.add_parser("serve", help="run the HTTP server; settings come from DERMLENS_*")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="TCP port")
    serve.add_argument("--check", action="store_true", help="only tell what it would run with, and what is wrong")
    serve.add_argument("--json", action="store_true", help="with --check: as JSON")
    serve.set_defaults(run=_serve)


class _Server(uvicorn.Server):
    """Ends with exit code 0 on the first SIGTERM or SIGINT, its requests answered, and at once with 1 on the second."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when all is done, so that an orderly stop looks like a kill (143)
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's arguments
        self.force_exit = self.should_exit
        self.should_exit = True


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    if options.check:
        return check.report(settings, as_json=options.json)
    memory.one_arena()
    logs.configure(settings.log_level, settings.log_format)
    for warning in unknown_variables(os.environ):
        LOG.warning(warning)
    config = uvicorn.Config(
        create_app(settings, on_failure=end_soon),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http=GuardedProtocol,
        ws="none",
        timeout_graceful_shutdown=math.ceil(settings.timeout_ms / 1000),
    )
    server = _Server(config)
    server.run()
    logging.shutdown()
    # All is answered and closed, or nobody waits any more: what is left are threads that may still run, and libraries
    # whose clean-up at exit has crashed (OpenVINO, once a version had been replaced)
    os._exit(1 if server.force_exit else 0)


def end_soon(_: str) -> None:
    """End the process once those who wait have been told; from any thread, whatever hangs."""

    def end() -> None:
        logging.shutdown()
        os._exit(FAILED)

    threading.Timer(1, end).start()
