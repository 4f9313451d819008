"""dermlens serve | predict | explain | models | keys | audit"""

import argparse
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import get_args

import numpy as np
import uvicorn
from numpy.typing import NDArray
from pydantic import ValidationError

from app import logs
from app.audit import AuditBroken, AuditFailed, AuditLocked, Secret, find, verify
from app.engines.base import EngineUnavailable
from app.main import OpenModel, create_app, list_models, open_model
from app.model import store
from app.model.labels import NOTICE, PREDICTED, Judgement, check_choices, judge
from app.model.overlay import METHODS, aim, render
from app.model.preprocess import PREVIEW_SIDE, DecodedImage, ImageError, decode
from app.protocol import GuardedProtocol
from app.security import Scope, new_key
from app.settings import Settings

REFUSALS = (
    store.StoreError,
    EngineUnavailable,
    AuditLocked,
    AuditBroken,
    AuditFailed,
    ValueError,
    OSError,
    RuntimeError,
)
FAILED = 70  # EX_SOFTWARE of sysexits.h: the device is lost or stuck, start the server again


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 some file failed, 2 nothing could be done."""
    options = _parser().parse_args(arguments)
    try:
        overridable = ("host", "port", "operating_point", "coverage")
        given = {key: value for key in overridable if (value := getattr(options, key, None)) is not None}
        sys.exit(options.run(options, Settings().model_copy(update=given)))
    except ValidationError as error:
        first = error.errors()[0]
        sys.stderr.write(f"dermlens: DERMLENS_{str(first['loc'][0]).upper()}: {first['msg']}\n")
    except REFUSALS as error:
        sys.stderr.write(f"dermlens: {error}\n")
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dermlens", description="Skin-lesion inference. " + NOTICE)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the HTTP server; settings come from DERMLENS_*")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="TCP port")
    serve.set_defaults(run=_serve)
    predict = commands.add_parser("predict", help="classify image files")
    predict.add_argument("files", nargs="+", type=Path, metavar="FILE")
    predict.add_argument("--json", action="store_true", help="one JSON object a line")
    predict.set_defaults(run=_predict)
    explain = commands.add_parser("explain", help="write a picture of where one image's evidence lies")
    explain.add_argument("file", type=Path, metavar="FILE")
    explain.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png")
    explain.add_argument("--target", default=PREDICTED, help="predicted (default) or a class name")
    explain.add_argument("--method", choices=METHODS, default="gradcam", help="gradcam (default) is the quick one")
    explain.add_argument("--style", choices=["overlay", "heatmap", "side-by-side"], default="overlay")
    explain.add_argument("--alpha", type=float, default=0.6, help="opacity at the peak, 0..1")
    explain.set_defaults(run=_explain)
    for command in (predict, explain):
        command.add_argument("--operating-point", metavar="NAME", help="in place of DERMLENS_OPERATING_POINT")
        command.add_argument("--coverage", help="in place of DERMLENS_COVERAGE; off never refers")
    _add_models(commands.add_parser("models", help="the published versions"))
    keys = commands.add_parser("keys", help="make API keys").add_subparsers(required=True, metavar="ACTION")
    new = keys.add_parser("new", help="draw a key; it is shown once, its entry for the key file goes to stdout")
    new.add_argument("name", help="who will hold it; appears in logs")
    new.add_argument("--scope", action="append", dest="scopes", required=True, choices=get_args(Scope))
    new.add_argument("--per-minute", type=int, help="requests a minute at most")
    new.set_defaults(run=_new_key)
    _add_audit(commands.add_parser("audit", help="check the audit log, or list an image's records"))
    return parser


def _add_audit(audit: argparse.ArgumentParser) -> None:
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("verify", help="exit code 1 where the log is not as it was written")
    check.add_argument("log", type=Path, metavar="PATH")
    check.set_defaults(run=_audit_verify)
    look = actions.add_parser("find", help="the records of an image file, one JSON object a line")
    look.add_argument("image", type=Path, metavar="IMAGE")
    look.add_argument("--log", type=Path, required=True, metavar="PATH")
    look.set_defaults(run=_audit_find)
    for action in (check, look):
        action.add_argument("--key-file", type=Path, required=True, help="what DERMLENS_AUDIT_KEY_FILE names")


def _add_models(models: argparse.ArgumentParser) -> None:
    models.add_argument("--json", action="store_true", help="the manifests as JSON")
    models.set_defaults(run=_models)
    actions = models.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("promote", _promote, "make a version the current one; a running server follows"),
        ("verify", _verify, "check every file of a version against its hash"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("version")
        action.set_defaults(run=run)
    actions.add_parser("rollback", help="back to the version that was current before").set_defaults(run=_rollback)
    prune = actions.add_parser("prune", help="delete old versions; the current and the previous one stay")
    prune.add_argument("--keep", type=int, default=3, help="newest versions to keep (default 3)")
    prune.set_defaults(run=_prune)


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


def _serve(_: argparse.Namespace, settings: Settings) -> int:
    logs.configure(settings.log_level, settings.log_format)
    config = uvicorn.Config(
        create_app(settings, on_failure=_end_soon),
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


def _end_soon(_: str) -> None:
    """End the process once those who wait have been told; from any thread, whatever hangs."""

    def end() -> None:
        logging.shutdown()
        os._exit(FAILED)

    threading.Timer(1, end).start()


def _predict(options: argparse.Namespace, settings: Settings) -> int:
    model, failed = open_model(settings), 0
    check_choices(model.manifest, operating_point=options.operating_point, coverage=options.coverage)
    for path in options.files:
        try:
            image, _, judgement = _see(path, model, settings)
        except (ImageError, OSError) as error:
            failed += 1
            sys.stderr.write(f"{path}: {error}\n")
            continue
        if options.json:
            row = asdict(judgement) | {"file": str(path), "warnings": image.warnings, "notice": NOTICE}
            print(json.dumps(row))
        else:
            chances = "  ".join(f"{name} {p:.3f}" for name, p in judgement.probabilities.items())
            reasons = [f"{'refer' if judgement.refer else 'note'}: {reason}" for reason in judgement.reasons]
            print("  ".join([f"{path}: {judgement.label}", chances, *reasons, *image.warnings]))
    sys.stderr.write(f"{len(options.files) - failed} of {len(options.files)} files classified. {NOTICE}\n")
    return 1 if failed else 0


def _explain(options: argparse.Namespace, settings: Settings) -> int:
    model = open_model(settings)
    check_choices(
        model.manifest,
        operating_point=options.operating_point,
        coverage=options.coverage,
        target=options.target,
    )
    if not 0 <= options.alpha <= 1:
        raise ValueError("--alpha: give a number from 0 to 1")
    image, cam, judgement = _see(options.file, model, settings, preview_side=PREVIEW_SIDE)
    shown = aim(options.target, options.method, judgement=judgement, manifest=model.manifest)
    raw = cam[shown.index]
    if options.method != "gradcam":
        raw = model.engine.attribute(image.pixels, options.method, target=shown.index)
    overlay = render(raw, image.preview, style=options.style, alpha=options.alpha, description=shown.description)
    options.output.write_bytes(overlay.png)
    evidence = "no evidence for it" if overlay.empty else f"peak {overlay.peak:.3g}"
    print(f"{options.output}: {shown.description}, {evidence}. {NOTICE}")
    return 0


def _see(
    path: Path, model: OpenModel, settings: Settings, *, preview_side: int = 0
) -> tuple[DecodedImage, NDArray[np.float32], Judgement]:
    """Decode, run and judge one file; the map is float32[K,H,W]."""
    image = decode(
        path.read_bytes(),
        size=model.manifest.preprocessing.size,
        max_pixels=settings.max_pixels,
        preview_side=preview_side,
    )
    logits, cam = model.engine.run(image.pixels[None])
    judgement = judge(logits[0], model.manifest, settings.operating_point, coverage=settings.coverage)
    return image, cam[0], judgement


def _models(options: argparse.Namespace, settings: Settings) -> int:
    try:
        served = store.current(settings.model_store, settings.model_name)
    except store.StoreError as error:
        served = None
        sys.stderr.write(f"{error}\n")
    for model in list_models(settings.model_store, settings.model_name, served):
        if options.json:
            print(model.model_dump_json())
            continue
        line = f"{'*' if model.served else ' '} {settings.model_name} {model.version}"
        metrics = (model.manifest or {}).get("metrics", {})
        figures = "  ".join(f"{k} {m['value']:.3f} ({m['low']:.3f}–{m['high']:.3f})" for k, m in metrics.items())
        print(f"{line}  {model.problem or figures}")
    return 0


def _promote(options: argparse.Namespace, settings: Settings) -> int:
    store.promote(settings.model_store, settings.model_name, options.version)
    print(f"{settings.model_name} {options.version} is current")
    return 0


def _rollback(_: argparse.Namespace, settings: Settings) -> int:
    version = store.rollback(settings.model_store, settings.model_name)
    print(f"{settings.model_name} {version} is current again")
    return 0


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    manifest = store.verify(settings.model_store, settings.model_name, options.version)
    print(f"{manifest.name} {manifest.version}: {len(manifest.files)} files are as they were published")
    return 0


def _prune(options: argparse.Namespace, settings: Settings) -> int:
    removed = store.prune(settings.model_store, settings.model_name, keep=options.keep)
    print(f"removed: {', '.join(removed) or 'nothing'}")
    return 0


def _audit_verify(options: argparse.Namespace, _: Settings) -> int:
    options.log.stat()  # a wrong path is no sound log
    try:
        summary = verify(options.log, Secret(options.key_file.read_bytes()))
    except AuditBroken as error:
        sys.stderr.write(f"dermlens: {error}\n")
        return 1
    print(
        f"{options.log}: {summary.records} records in {summary.files} files, {summary.first} to {summary.last}: sound"
    )
    return 0


def _audit_find(options: argparse.Namespace, _: Settings) -> int:
    options.log.stat()
    for record in find(options.log, Secret(options.key_file.read_bytes()), options.image.read_bytes()):
        print(json.dumps(record))
    return 0


def _new_key(options: argparse.Namespace, _: Settings) -> int:
    key = new_key(options.name, options.scopes, per_minute=options.per_minute)
    sys.stderr.write(f"{key.secret}\n")
    print(key.toml)
    return 0


if __name__ == "__main__":
    main()
