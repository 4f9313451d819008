"""dermlens doctor"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from app.cli.check import describe
from app.cli.tell import tell
from app.main import OpenModel, batch_size, open_model
from app.model.preprocess import decode
from app.settings import Settings

REPEATS = 20
PHOTOGRAPH = (1024, 768)  # pixels; what the speed of decoding is measured on


class Finding(NamedTuple):
    """One thing that was looked at; `problem` alone keeps the server from its work."""

    check: str
    status: Literal["ok", "advice", "problem"]
    detail: str


def add(commands: Any) -> None:
    """Add `doctor`."""
    doctor = commands.add_parser("doctor", help="look at settings, model, device and speed; exit code 1 on a problem")
    doctor.add_argument("--json", action="store_true", help="one JSON object a finding")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, settings: Settings) -> int:
    worst = "ok"
    for finding in _look(settings):
        tell(options, f"{finding.status:8} {finding.check}: {finding.detail}", **finding._asdict())
        worst = "problem" if finding.status == "problem" else worst
    return 1 if worst == "problem" else 0


def _look(settings: Settings) -> Iterator[Finding]:
    """Every finding, the speed last and only where nothing is wrong."""
    found = describe(settings)
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in found["versions"].items())
    yield Finding("versions", "ok", versions)
    for device in found["devices"]:
        yield Finding("device", "ok", device)
    if engine := found["engine"]:
        precision = engine["precision"]
        more = f"; {precision['precision']}, since {precision['why']}" if precision else ""
        yield Finding("engine", "ok", f"{engine['engine']}, since {engine['why']}{more}")
    if model := found["model"]:
        yield Finding("model", "ok", f"{model['name']} {model['version']}, every file verified")
    for warning in found["warnings"]:
        yield Finding("settings", "advice", warning)
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        yield Finding("keys", "advice", f"everybody who reaches {settings.host} may call: set DERMLENS_API_KEYS")
    for problem in found["problems"]:
        yield Finding(problem["setting"], "problem", problem["problem"])
    if not found["problems"]:
        yield from _speed(settings, open_model(settings))


def _speed(settings: Settings, model: OpenModel) -> Iterator[Finding]:
    size, max_batch = model.manifest.preprocessing.size, batch_size(settings, model.engine)
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(PHOTOGRAPH).save(buffer, "JPEG", quality=90)
    photograph = buffer.getvalue()
    images = np.zeros((max_batch, 3, size, size), dtype=np.uint8)
    width, height = PHOTOGRAPH
    yield _timed(f"decode of a {width}×{height} JPEG", lambda: decode(photograph, size=size))
    yield _timed("forward pass of 1 image", lambda: model.engine.run(images[:1]))
    yield _timed(f"forward pass of {max_batch} images", lambda: model.engine.run(images))


def _timed(what: str, work: Callable[[], object]) -> Finding:
    """Median and spread of some runs, after one that does not count; advice where they differ by much."""
    work()
    taken_ms = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken_ms.append(1000 * (time.perf_counter() - started))
    low, median, high = np.percentile(taken_ms, [10, 50, 90])
    noisy = high > 2 * low
    advice = ": other programs take its time, stop them and look again" if noisy else ""
    figures = f"median {median:.1f} ms, 10th to 90th percentile {low:.1f} to {high:.1f}{advice}"
    return Finding(what, "advice" if noisy else "ok", figures)
