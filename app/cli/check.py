"""dermlens serve --check: what the server would run with, and what is wrong with it, without starting it."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal, TypeVar

from app.engines.base import EngineUnavailable, build_decoder, choose_engine, own_precision
from app.main import audit_secret, check_decoder, current, defaults_for
from app.model import store
from app.model.labels import check_choices
from app.model.store import LoadedVersion
from app.security import read_keys
from app.settings import Settings, unknown_variables, variable

T = TypeVar("T")


def report(settings: Settings, *, as_json: bool) -> int:
    """Print what `describe` finds; the exit code, 2 where something is wrong."""
    found = describe(settings)
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))
    return 2 if found["problems"] else 0


def describe(settings: Settings) -> dict[str, Any]:
    """Everything about a start that can be told before it, ready for JSON; of a secret its path alone.

    Keys: `versions`, `settings` (`value`, and whether it was `set`), `devices`, `engine` (engine, why, precision;
    None where there is none), `model` (name, version; None unless every file was verified), `warnings`, `problems`
    (setting, problem).
    """
    problems: list[dict[str, str]] = []

    def attempt(field: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except (store.StoreError, EngineUnavailable, ImportError, ValueError, OSError) as error:
            problems.append({"setting": variable(field), "problem": str(error)})
            return None

    attempt("api_keys", lambda: read_keys(settings.api_keys) if settings.api_keys else None)
    if log := settings.audit_log:
        attempt("audit_key_file", lambda: audit_secret(settings))
        attempt("audit_log", lambda: _check_folder(log))
    attempt("decode_isolation", lambda: check_decoder(settings))
    attempt("decoder", lambda: build_decoder(settings.decoder))
    version = attempt("model_store", lambda: current(settings)[0])
    loaded = version and attempt(
        "model_version", lambda: store.load(settings.model_store, settings.model_name, version)
    )
    if loaded:
        for field, chosen in defaults_for(loaded.manifest, settings).items():
            attempt(field, lambda given={field: chosen}: check_choices(loaded.manifest, **given))  # type: ignore[misc]
    choice = attempt("engine", lambda: choose_engine(settings.engine))
    precision = None
    if choice and loaded:
        precision = attempt("precision", lambda: _precision(settings, choice.engine, loaded))
    values = settings.model_dump(mode="json")
    return {
        "versions": _versions(),
        "settings": {variable(f): {"value": v, "set": f in settings.model_fields_set} for f, v in values.items()},
        "devices": _devices(cuda=choice is not None and choice.engine == "cuda"),
        "engine": choice and choice._asdict() | {"precision": precision},
        "model": loaded and {"name": settings.model_name, "version": version},
        "warnings": unknown_variables(os.environ),
        "problems": problems,
    }


def _check_folder(file: Path) -> None:
    folder = file.resolve().parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{file} cannot be written: make {folder}, and let this user write there")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{package} {version or 'not installed'}" for package, version in found["versions"].items())
    yield "settings; * those that were set:"
    yield from (f"{'*' if s['set'] else ' '} {name}={s['value']}" for name, s in found["settings"].items())
    yield from (f"device: {device}" for device in found["devices"])
    if engine := found["engine"]:
        yield f"engine: {engine['engine']}, since {engine['why']}"
        if precision := engine["precision"]:
            yield f"precision: {precision['precision']}, since {precision['why']}"
    if model := found["model"]:
        yield f"model: {model['name']} {model['version']}, every file verified"
    yield from (f"warning: {warning}" for warning in found["warnings"])
    yield from (f"problem: {p['setting']}: {p['problem']}" for p in found["problems"])
    yield f"{len(found['problems'])} to put right before it starts" if found["problems"] else "it would start"


def _versions() -> dict[str, str | None]:
    """Of what serves; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("dermlens", "openvino", "torch"):
        try:
            found[package] = installed_version(package)  # importing torch would take seconds
        except PackageNotFoundError:
            found[package] = None
    return found


def _devices(*, cuda: bool) -> list[str]:
    from app.engines.openvino_engine import the_core

    cores = len(os.sched_getaffinity(0))
    found = [f"{the_core().get_property('CPU', 'FULL_DEVICE_NAME')}, {cores} cores"]
    if cuda:
        from app.engines.torch_engine import cuda_names

        found += cuda_names()
    return found


def _precision(
    settings: Settings, engine: Literal["cuda", "openvino", "torch"], version: LoadedVersion
) -> dict[str, str]:
    if engine != "openvino":
        return {"precision": own_precision(engine, wanted=settings.precision), "why": f"{engine} has no other here"}
    from app.engines.openvino_engine import choose_precision, computes_bfloat16

    bfloat16 = computes_bfloat16()
    why = [
        "the processor computes in bfloat16" if bfloat16 else "the processor does not compute in bfloat16",
        "the version has an int8 graph" if version.int8 else "the version has no int8 graph",
    ]
    asked = f"DERMLENS_PRECISION={settings.precision}"
    chosen = choose_precision(settings.precision, version, bfloat16=bfloat16)
    return {"precision": chosen, "why": " and ".join(why) if settings.precision == "auto" else asked}
