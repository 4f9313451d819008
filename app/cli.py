"""dermlens serve | predict | explain | models"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import numpy as np
import uvicorn
from numpy.typing import NDArray
from pydantic import ValidationError

from app.engines.base import EngineUnavailable
from app.main import OpenModel, create_app, list_models, open_model
from app.model import store
from app.model.labels import NOTICE, PREDICTED, Judgement, check_choices, judge
from app.model.overlay import METHODS, aim, render
from app.model.preprocess import PREVIEW_SIDE, DecodedImage, ImageError, decode
from app.settings import Settings


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
    except (store.StoreError, EngineUnavailable, ValueError, OSError) as error:
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
    models = commands.add_parser("models", help="list the published versions")
    models.add_argument("--json", action="store_true", help="the manifests as JSON")
    models.set_defaults(run=_models)
    return parser


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
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout_ms / 1000),
    )
    server = _Server(config)
    server.run()
    if server.force_exit:
        os._exit(1)  # a forward pass may still run in its thread, and nobody waits for it any more
    return 0


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
    except store.VersionMissing:
        served = None
        sys.stderr.write("no version is current\n")
    for model in list_models(settings.model_store, settings.model_name, served):
        if options.json:
            print(model.model_dump_json())
            continue
        line = f"{'*' if model.served else ' '} {settings.model_name} {model.version}"
        metrics = (model.manifest or {}).get("metrics", {})
        figures = "  ".join(f"{k} {m['value']:.3f} ({m['low']:.3f}–{m['high']:.3f})" for k, m in metrics.items())
        print(f"{line}  {model.problem or figures}")
    return 0


if __name__ == "__main__":
    main()
