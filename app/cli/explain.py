"""dermlens explain"""

import argparse
from pathlib import Path
from typing import Any

from app.cli.see import judged, read, run
from app.cli.tell import tell
from app.files import refuse_overwriting, write_whole
from app.main import open_model
from app.model.labels import NOTICE, PREDICTED, check_choices
from app.model.overlay import METHODS, aim, render
from app.model.preprocess import PREVIEW_SIDE
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `explain`."""
    explain = commands.add_parser("explain", help="write a picture of where one image's evidence lies")
    explain.add_argument("file", type=Path, metavar="FILE")
    explain.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png")
    explain.add_argument("--target", default=PREDICTED, help="predicted (default) or a class name")
    explain.add_argument("--method", choices=METHODS, default="gradcam", help="gradcam (default) is the quick one")
    explain.add_argument("--style", choices=["overlay", "heatmap", "side-by-side"], default="overlay")
    explain.add_argument("--alpha", type=float, default=0.6, help="opacity at the peak, 0..1")
    explain.add_argument("--operating-point", metavar="NAME", help="in place of DERMLENS_OPERATING_POINT")
    explain.add_argument("--coverage", help="in place of DERMLENS_COVERAGE; off forms no set of plausible classes")
    explain.add_argument("--tta", choices=["none", "flips"], default="none", help="flips: mean of four mirror images")
    explain.add_argument("--json", action="store_true", help="what was drawn, as a JSON object")
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace, settings: Settings) -> int:
    refuse_overwriting(options.file, options.output)
    model = open_model(settings)
    check_choices(
        model.manifest,
        operating_point=options.operating_point,
        coverage=options.coverage,
        target=options.target,
    )
    if not 0 <= options.alpha <= 1:
        raise ValueError("--alpha: give a number from 0 to 1")
    picture = read(options.file.read_bytes(), model, settings, preview_side=PREVIEW_SIDE)
    [output] = run([picture], model, tta=options.tta)
    judgement = judged(picture, output, model, settings)
    shown = aim(options.target, options.method, judgement=judgement, manifest=model.manifest)
    raw = output.cam[shown.index]
    if options.method != "gradcam":
        raw = model.engine.attribute(picture.image.pixels, options.method, target=shown.index)
    overlay = render(
        raw,
        picture.image.preview,
        lit=picture.image.lit,
        style=options.style,
        alpha=options.alpha,
        description=shown.description,
    )
    write_whole(options.output, overlay.png)
    evidence = "no evidence for it" if overlay.empty else f"peak {overlay.peak:.3g}"
    tell(
        options,
        f"{options.output}: {shown.description}, {evidence}. {NOTICE}",
        output=str(options.output),
        version=model.manifest.version,
        label=judgement.label,
        probabilities=judgement.probabilities,
        target=shown.label,
        peak=overlay.peak,
        empty=overlay.empty,
        notice=NOTICE,
    )
    return 0
