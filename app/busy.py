"""503 for a request that has no place, before a task, a route or a log line is spent on it."""

import functools
import logging
import time
from typing import NamedTuple

from prometheus_client import Counter, Histogram
from starlette.types import Scope

from app.batcher import QueueFull
from app.errors import problem_of
from app.metrics import Metrics
from app.middleware import request_id_of
from app.schemas import Problem
from app.served import Served

PATHS = ("/predict", "/predict/batch", "/explain")
LOG = logging.getLogger(__name__)


class Refusal(NamedTuple):
    problem: Problem
    retry_after_s: int


class Busy:
    """Whether a request is refused at once; what it cannot tell, the routes still do.

    Args:
        timeout_ms: the server's own limit for an answer.
    """

    def __init__(self, served: Served, metrics: Metrics, *, timeout_ms: int) -> None:
        self._served = served
        self._metrics = metrics
        self._timeout_ms = timeout_ms
        self._counters = functools.cache(self._find_counters)  # the look-up is half of what a refusal costs
        self._untold = 0  # refusals since the last log line
        self._told_at = 0.0

    def __call__(self, scope: Scope) -> Refusal | None:
        """The refusal of an ASGI request whose body is still to come, or None."""
        if scope["path"] not in PATHS or scope["method"] != "POST":
            return None
        started = time.perf_counter()
        headers = dict(scope["headers"])
        if b"origin" in headers:  # a page of elsewhere reads no answer without the headers that CORS adds
            return None
        try:
            asked_ms = int(headers.get(b"x-timeout-ms", self._timeout_ms))
            self._served.now.batcher.refuse_if_full(
                timeout_s=min(asked_ms, self._timeout_ms) / 1000, background=headers.get(b"x-priority") == b"batch"
            )
        except QueueFull as error:
            refusal = Refusal(problem_of(error, request_id_of(scope)), error.retry_after_s)
        except Exception:  # a header that is no number, a server that stops: the routes say so
            return None
        else:
            return None
        self._count(scope["path"], refusal, time.perf_counter() - started)
        return refusal

    def _count(self, route: str, refusal: Refusal, seconds: float) -> None:
        """In the metrics each; in the log together, a line a second at most."""
        requests, request_seconds, rejected = self._counters(route, refusal.problem.status, refusal.problem.slug)
        requests.inc()
        request_seconds.observe(seconds)
        rejected.inc()
        self._untold += 1
        if time.monotonic() - self._told_at >= 1:
            LOG.info("refused, the queue is full", extra={"requests": self._untold})
            self._untold, self._told_at = 0, time.monotonic()

    def _find_counters(self, route: str, status: int, slug: str) -> tuple[Counter, Histogram, Counter]:
        return (
            self._metrics.requests.labels(route=route, status=str(status)),
            self._metrics.request_seconds.labels(route=route),
            self._metrics.rejected.labels(reason=slug),
        )
