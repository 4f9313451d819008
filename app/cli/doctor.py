"""dermlens doctor"""

import argparse
import io
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from app.cli.tell import tell
from app.engines.base import EngineUnavailable, nvidia_driver
from app.main import OpenModel, batch_size, current, open_model
from app.model import store
from app.model.preprocess import decode
from app.security import BadKeys, read_keys
from app.settings import Settings

PACKAGES = ("dermlens", "openvino", "torch", "numpy", "pillow", "fastapi", "uvicorn", "httpx2")
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
    """Every finding, the quick ones first."""
    yield Finding("versions", "ok", ", ".join([f"Python {platform.python_version()}", *_versions()]))
    yield from _settings(settings)
    try:
        model = open_model(settings)
    except store.StoreError as error:
        yield Finding("model", "problem", f"{error}: see dermlens models, and DERMLENS_MODEL_STORE")
        return
    except (EngineUnavailable, ValueError, OSError, RuntimeError) as error:
        yield Finding("engine", "problem", str(error))
        return
    yield Finding("model", "ok", f"{model.manifest.name} {current(settings)[0]}, its files are as they were published")
    yield from _device(settings, model)
    yield from _speed(settings, model)


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def _settings(settings: Settings) -> Iterator[Finding]:
    known = {f"DERMLENS_{name.upper()}" for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("DERMLENS_") and name not in known)
    if unknown:
        yield Finding("settings", "advice", f"{', '.join(unknown)}: no setting of the server, see docs/settings.md")
    else:
        given = sorted(name for name in os.environ if name in known)
        yield Finding("settings", "ok", f"{', '.join(given) or 'none'} set, the rest as they come")
    if settings.api_keys:
        try:
            keys = read_keys(settings.api_keys)
        except BadKeys as error:
            yield Finding("keys", "problem", str(error))
        else:
            yield Finding("keys", "ok", f"{settings.api_keys}: {len(keys)} keys")
    elif settings.host not in ("127.0.0.1", "::1", "localhost"):
        yield Finding("keys", "advice", f"everybody who reaches {settings.host} may call: set DERMLENS_API_KEYS")


def _device(settings: Settings, model: OpenModel) -> Iterator[Finding]:
    engine, cores = model.engine, len(os.sched_getaffinity(0))
    yield Finding("device", "ok", f"{engine.name} on {engine.device} in {engine.precision}, {cores} CPU cores")
    if engine.device == "cpu" and settings.engine == "auto" and nvidia_driver():
        yield Finding("device", "advice", "there is an NVIDIA driver, but torch sees no GPU: see docs/deployment.md")


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
