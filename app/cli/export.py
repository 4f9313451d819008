"""dermlens export"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from app.cli.tell import tell
from app.engines.base import build_engine
from app.main import current
from app.model import store
from app.model.labels import NOTICE
from app.model.manifest import Manifest
from app.settings import Settings

MOST_STRAYED = 1e-3  # between ONNX Runtime and the server's float32, of the largest value; rounding alone is 1e-6
TRITON_BATCH = 32  # as DERMLENS_MAX_BATCH on a GPU
# https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
CONFIG = """\
# Of {name} {version}, by dermlens export. {notice}
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
dynamic_batching {{ }}
input [ {{ name: "image", data_type: TYPE_UINT8, dims: [ 3, {size}, {size} ] }} ]
output [
  {{ name: "logits", data_type: TYPE_FP32, dims: [ {classes} ] }},
  {{ name: "cam", data_type: TYPE_FP32, dims: [ {classes}, {side}, {side} ] }}
]
parameters {{ key: "classes" value: {{ string_value: {labels} }} }}
parameters {{ key: "temperature" value: {{ string_value: "{temperature}" }} }}
parameters {{ key: "notice" value: {{ string_value: "{notice}" }} }}
"""


def add(commands: Any) -> None:
    """Add `export`."""
    export = commands.add_parser("export", help="write a version as a file that other servers run")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="onnx (default)")
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, metavar="MODEL.onnx")
    where.add_argument(
        "--triton", type=Path, metavar="DIR", help="into this model repository of Triton, with its config"
    )
    export.add_argument("--version", metavar="V", help="in place of DERMLENS_MODEL_VERSION")
    export.add_argument("--json", action="store_true", help="what was written as one JSON object")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace, settings: Settings) -> int:
    try:
        import onnxruntime  # noqa: F401 - for `_check`: what is missing is told before any work

        from app.model.onnx_graph import build_onnx
    except ModuleNotFoundError as error:
        raise RuntimeError(f"there is no {error.name} here: pip install '.[onnx]'") from None
    loaded = store.load(settings.model_store, settings.model_name, options.version or current(settings)[0])
    manifest = loaded.manifest
    output = options.output or _triton_folder(options.triton, manifest) / "model.onnx"
    title = f"{manifest.name} {manifest.version}"
    sys.stderr.write(f"building the graph of {title}\n")
    model = build_onnx(manifest, loaded.weights).SerializeToString()
    sys.stderr.write("running it in ONNX Runtime beside the server's engine\n")
    strayed = _check(model, loaded, threads=settings.cpu_threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.triton:
        (output.parent.parent / "config.pbtxt").write_text(_triton_config(manifest))
    partial = output.with_name(f".{output.name}.partial")  # a server that polls the folder sees a whole file
    partial.write_bytes(model)
    os.replace(partial, output)
    agreement = f"its outputs are the server's within {strayed:.0e} of the largest value"
    text = f"{output}: {title}, {len(model) / 1e6:.1f} MB, {agreement}. {NOTICE}"
    tell(options, text, output=str(output), name=manifest.name, version=manifest.version, strayed=float(strayed))
    return 0


def _check(model: bytes, loaded: store.LoadedVersion, *, threads: int) -> float:
    """How far ONNX Runtime's outputs are from those of the server's engine in float32, as a share of the largest value.

    Raises:
        RuntimeError: too far.
    """
    import onnxruntime

    engine = build_engine("openvino", loaded, precision="float32", threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    size = loaded.manifest.preprocessing.size
    images = np.random.default_rng(0).integers(0, 256, (5, 3, size, size), dtype=np.uint8)
    strayed = max(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for batch in (images[:1], images)
        for ours, theirs in zip(session.run(["logits", "cam"], {"image": batch}), engine.run(batch)[:2], strict=True)
    )
    if not strayed <= MOST_STRAYED:  # NaN too
        raise RuntimeError(
            f"ONNX Runtime strays from the server by {strayed:.2g} of the largest value, so nothing was written: "
            "report it with the versions of onnx and onnxruntime"
        )
    return strayed


def _triton_folder(repository: Path, manifest: Manifest) -> Path:
    """The version's folder in a model repository: `<repository>/<model>/<version>`.

    Raises:
        ValueError: Triton would pass the version over.
    """
    version = manifest.version
    if not version.isdecimal() or version.startswith("0"):
        raise ValueError(f"Triton knows versions by number, not {version!r}: use -o, and lay out the folder yourself")
    return repository / manifest.name / version


def _triton_config(manifest: Manifest) -> str:
    size = manifest.preprocessing.size
    return CONFIG.format(
        name=manifest.name,
        version=manifest.version,
        max_batch=TRITON_BATCH,
        size=size,
        side=size // (16 if manifest.architecture.gate else 32),
        classes=len(manifest.classes),
        labels=json.dumps(",".join(manifest.classes), ensure_ascii=False),
        temperature=manifest.temperature,
        notice=NOTICE,
    )
