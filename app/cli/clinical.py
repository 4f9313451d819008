"""dermlens dicom"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from app.cli.see import evidence, judged, read, run
from app.files import refuse_overwriting, write_whole
from app.main import open_model
from app.model.labels import NOTICE
from app.model.preprocess import PREVIEW_SIDE
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `dicom`."""
    dicom = commands.add_parser("dicom", help="answer one DICOM photograph with DICOM files, to be filed in its study")
    dicom.add_argument("file", type=Path, metavar="FILE")
    dicom.add_argument("--sr", type=Path, metavar="OUT.dcm", help="write the answer as a structured report")
    dicom.add_argument("--overlay", type=Path, metavar="OUT.dcm", help="write its evidence as a Secondary Capture")
    dicom.set_defaults(run=_dicom)


def _dicom(options: argparse.Namespace, settings: Settings) -> int:
    if not (options.sr or options.overlay):
        raise ValueError("nothing to write: give --sr OUT.dcm, --overlay OUT.dcm or both")
    return write_dicom(options.file, settings, sr=options.sr, capture=options.overlay)


def write_dicom(file: Path, settings: Settings, *, sr: Path | None = None, capture: Path | None = None) -> int:
    """Classify one DICOM photograph; write a structured report of it, a Secondary Capture of its evidence, or both."""
    out = _dicom_out()
    refuse_overwriting(file, *(path for path in (sr, capture) if path))
    model, source = open_model(settings), file.read_bytes()
    picture = read(source, model, settings, preview_side=PREVIEW_SIDE)
    [output] = run([picture], model, tta="none")
    judgement = judged(picture, output, model, settings)
    if sr:
        write_whole(sr, out.structured_report(source, judgement, model.manifest))
    if capture:
        png, description = evidence(picture, output, judgement, model)
        write_whole(capture, out.secondary_capture(source, png, model.manifest, description=description))
    chances = "  ".join(f"{name} {p:.3f}" for name, p in judgement.probabilities.items())
    reasons = [f"{'refer' if judgement.refer else 'note'}: {reason}" for reason in judgement.reasons]
    print("  ".join([f"{file}: {judgement.label}", chances, *reasons, *picture.image.warnings]))
    written = ", ".join(str(path) for path in (sr, capture) if path)
    sys.stderr.write(f"written, preliminary and unverified: {written}. {NOTICE}\n")
    return 0


def _dicom_out() -> ModuleType:
    try:
        return importlib.import_module("app.clinical.dicom_out")
    except ImportError as error:
        raise RuntimeError("to write DICOM: pip install '.[clinical]'") from error
