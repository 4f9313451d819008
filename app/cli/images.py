"""dermlens predict | explain"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.main import OpenModel, open_model
from app.model.flips import Tta, flips, mean_cam, mean_logits
from app.model.labels import NOTICE, PREDICTED, Judgement, check_choices, judge
from app.model.out_of_distribution import score_of
from app.model.overlay import METHODS, aim, render
from app.model.preprocess import PREVIEW_SIDE, DecodedImage, ImageError, decode
from app.model.quality import assess, measure
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `predict` and `explain`."""
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
        command.add_argument("--coverage", help="in place of DERMLENS_COVERAGE; off forms no set of plausible classes")
        command.add_argument(
            "--tta", choices=["none", "flips"], default="none", help="flips: mean of four mirror images"
        )


def _predict(options: argparse.Namespace, settings: Settings) -> int:
    model, failed = open_model(settings), 0
    check_choices(model.manifest, operating_point=options.operating_point, coverage=options.coverage)
    for path in options.files:
        try:
            image, _, judgement = _see(path, model, settings, tta=options.tta)
        except (ImageError, OSError) as error:
            failed += 1
            sys.stderr.write(f"{path}: {error}\n")
            continue
        if options.json:
            row = asdict(judgement) | {
                "refer": judgement.refer,
                "file": str(path),
                "warnings": image.warnings,
                "notice": NOTICE,
            }
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
    image, cam, judgement = _see(options.file, model, settings, tta=options.tta, preview_side=PREVIEW_SIDE)
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
    path: Path, model: OpenModel, settings: Settings, *, tta: Tta, preview_side: int = 0
) -> tuple[DecodedImage, NDArray[np.float32], Judgement]:
    """Decode, run and judge one file; the map is float32[K,H,W]."""
    image = decode(
        path.read_bytes(),
        size=model.manifest.preprocessing.size,
        max_pixels=settings.max_pixels,
        preview_side=preview_side,
    )
    quality = assess(measure(image.pixels))
    seen = flips(image.pixels) if tta == "flips" else [image.pixels]
    logits, cam, features = model.engine.run(np.stack(seen))
    judgement = judge(
        mean_logits(list(logits)),
        model.manifest,
        settings.operating_point,
        coverage=settings.coverage,
        score=score_of(None if features is None else features[0], model.familiar),
        spoilt=quality.spoilt,
    )
    image = replace(image, warnings=(*image.warnings, *quality.warnings))
    return image, mean_cam(list(cam)), judgement
