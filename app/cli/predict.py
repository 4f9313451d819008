"""dermlens predict"""

import argparse
import base64
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from app.batcher import NotFinite
from app.cli.clinical import write_dicom
from app.cli.results import Rule, Table, row_of
from app.cli.see import Picture, evidence, judged, read, run
from app.files import images_in, write_whole
from app.main import OpenModel, batch_size, open_model
from app.model.flips import Tta
from app.model.labels import NOTICE, OFF, check_choices
from app.model.preprocess import PREVIEW_SIDE, ImageError
from app.schemas import Explanation, Prediction, prediction_fields
from app.settings import Settings

REQUESTS = 4  # to a server at once, unless told otherwise


@dataclass(frozen=True)
class Scored:
    """What came of one file, and its picture as a PNG where one was asked for."""

    path: Path
    outcome: Prediction | Exception
    png: bytes = b""


@dataclass(frozen=True)
class Source:
    """What classifies: the model here or a server."""

    rule: Rule
    classes: list[str]
    score: Callable[[list[Path]], Iterator[Scored]]


def add(commands: Any) -> None:
    """Add `predict`."""
    predict = commands.add_parser("predict", help="classify image files and folders")
    predict.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="an image file, or a folder of them")
    predict.add_argument("-r", "--recursive", action="store_true", help="the sub-folders of a folder as well")
    predict.add_argument("--csv", type=Path, metavar="OUT.csv", help="write the results here; goes on where it stopped")
    predict.add_argument("--restart", action="store_true", help="start the CSV file over")
    predict.add_argument("--overlays", type=Path, metavar="FOLDER", help="write a picture of each image's evidence")
    predict.add_argument(
        "--sr", type=Path, metavar="OUT.dcm", help="of one DICOM photograph: write a structured report"
    )
    predict.add_argument("--operating-point", metavar="NAME", help="in place of DERMLENS_OPERATING_POINT")
    predict.add_argument("--coverage", help="in place of DERMLENS_COVERAGE; off forms no set of plausible classes")
    predict.add_argument("--tta", choices=["none", "flips"], default="none", help="flips: mean of four mirror images")
    predict.add_argument("--json", action="store_true", help="one JSON object a file")
    predict.add_argument("--url", help="ask a running server in place of loading the model")
    predict.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the server's API key")
    predict.add_argument("--workers", type=int, metavar="N", help="images decoded, or requests, at once")
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace, settings: Settings) -> int:
    if options.sr:
        return _report_in_dicom(options, settings)
    if options.restart and not options.csv:
        raise ValueError("--restart starts a CSV file over: name it with --csv")
    if options.api_key_file and not options.url:
        raise ValueError("--api-key-file is for a server: name it with --url")
    workers = (REQUESTS if options.url else settings.workers) if options.workers is None else options.workers
    if workers < 1:
        raise ValueError("--workers: give 1 or more")
    paths, others = _find(options)
    overlay_of = _overlay_paths(options, paths)
    if options.csv and options.csv.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"{options.csv}: is one of the images: give another file for the results")
    with ExitStack() as stack:
        source = (_server if options.url else _engine)(options, settings, workers, stack)
        table = None
        if options.csv:
            table = stack.enter_context(Table(options.csv, source.classes, restart=options.restart))
        left = [path for path in paths if not table or not table.done(path, source.rule, overlay=overlay_of(path))]
        report = _Report(options, table, overlay_of, total=len(paths), before=len(paths) - len(left))
        try:
            with _progress(
                len(paths), done=len(paths) - len(left), quiet=table is None and sys.stdout.isatty()
            ) as step:
                for scored in source.score(left):
                    report.take(scored)
                    step()
        except BaseException as error:
            report.summarise(others, "interrupted, " if isinstance(error, KeyboardInterrupt) else "stopped, ")
            raise
        report.summarise(others)
        return 1 if report.failed else 0


def _report_in_dicom(options: argparse.Namespace, settings: Settings) -> int:
    """As `dermlens dicom`, at an operating point and coverage of its own."""
    if len(options.paths) != 1:
        raise ValueError("--sr: give one DICOM file")
    defaults = {"recursive": False, "restart": False, "json": False, "tta": "none"}
    for name in ("recursive", "csv", "restart", "overlays", "tta", "json", "url", "api_key_file", "workers"):
        if getattr(options, name) != defaults.get(name):
            raise ValueError(f"--sr: give one DICOM file, without --{name.replace('_', '-')}")
    chosen = {name: getattr(options, name) for name in ("operating_point", "coverage") if getattr(options, name)}
    return write_dicom(options.paths[0], settings.model_copy(update=chosen), sr=options.sr)


class _Report:
    """Writes and counts the results of one run."""

    def __init__(
        self,
        options: argparse.Namespace,
        table: Table | None,
        overlay_of: Callable[[Path], Path | None],
        *,
        total: int,
        before: int,
    ) -> None:
        self._options, self._table, self._overlay_of = options, table, overlay_of
        self._total, self._before = total, before
        self.failed = self.classified = 0

    def take(self, scored: Scored) -> None:
        """Write a picture, then the row that names it."""
        outcome, overlay = scored.outcome, self._overlay_of(scored.path)
        if overlay is not None and isinstance(outcome, Prediction):
            try:
                write_whole(overlay, scored.png)
            except OSError as error:
                outcome = error
        row = row_of(scored.path, outcome, overlay, tta=self._options.tta)
        if self._table is not None:
            self._table.add(row)
        if self._options.json:
            print(json.dumps(row), flush=True)
        elif isinstance(outcome, Prediction) and self._table is None:
            print(_sentence(row))
        if isinstance(outcome, Prediction):
            self.classified += 1
        else:
            self.failed += 1
            _say(f"{scored.path}: {outcome}")

    def summarise(self, others: int, how: str = "") -> None:
        """The last line."""
        done = self.classified + self._before
        notes = [f"{self._before} of them before"] * bool(self._before) + [f"{self.failed} failed"] * bool(self.failed)
        notes += [f"{others} files of other kinds left out"] * bool(others)
        again = "; the same command goes on from here" if how and self._table is not None else ""
        _say(f"{how}{', '.join([f'{done} of {self._total} files classified', *notes])}{again}. {NOTICE}")


def _find(options: argparse.Namespace) -> tuple[list[Path], int]:
    """The files to classify, each once, and how many of the folders' files are no images by name."""
    overlays = options.overlays.resolve() if options.overlays else None
    paths, others = [], 0
    for path in options.paths:
        if path.is_dir():
            found = images_in(path, recursive=options.recursive, leave_out=overlays)
            paths += found.images
            others += found.others
        else:
            paths.append(path)
    if not paths:
        deeper = "" if options.recursive else ", or use --recursive for their sub-folders"
        places = ", ".join(map(str, options.paths))
        raise ValueError(f"no image in {places}: give folders of JPEG, PNG, WebP or DICOM{deeper}")
    return list(dict.fromkeys(paths)), others


def _overlay_paths(options: argparse.Namespace, paths: list[Path]) -> Callable[[Path], Path | None]:
    """Where each file's picture goes: as the images lie to each other, its whole name kept, so that no two meet."""
    if options.overlays is None:
        return lambda _: None
    folder = options.overlays.resolve()
    if any(folder in path.resolve().parents for path in paths):
        raise ValueError(f"--overlays {options.overlays}: holds the images themselves: give another folder")
    tops = [path if path.is_dir() else path.parent for path in options.paths]
    top = os.path.commonpath([os.path.abspath(path) for path in tops])

    def place(path: Path) -> Path:
        inside = Path(os.path.relpath(os.path.abspath(path), top))
        return Path(options.overlays) / inside.with_name(f"{inside.name}.png")

    return place


def _sentence(row: dict[str, Any]) -> str:
    """A result in a line for people."""
    chances = "  ".join(f"{name} {p:.3f}" for name, p in row["probabilities"].items())
    reasons = [f"{'refer' if row['refer'] else 'note'}: {reason}" for reason in row["reasons"]]
    return "  ".join([f"{row['file']}: {row['label']}", chances, *reasons, *row["warnings"]])


def _engine(options: argparse.Namespace, settings: Settings, workers: int, _: ExitStack) -> Source:
    """The model, loaded here."""
    model = open_model(settings)
    manifest = model.manifest
    check_choices(manifest, operating_point=options.operating_point, coverage=options.coverage)

    def score(paths: list[Path]) -> Iterator[Scored]:
        return _score(paths, model, settings, workers=workers, draw=options.overlays is not None, tta=options.tta)

    rule = _rule(settings, manifest.version, options.tta, manifest.operating_points, manifest.abstention)
    return Source(rule, list(manifest.classes), score)


def _score(
    paths: list[Path], model: OpenModel, settings: Settings, *, workers: int, draw: bool, tta: Tta
) -> Iterator[Scored]:
    """Classify files in their order: threads decode ahead of the engine, which runs batches."""
    max_batch = batch_size(settings, model.engine)

    def open_image(path: Path) -> Picture:
        return read(path.read_bytes(), model, settings, preview_side=PREVIEW_SIDE if draw else 0)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting = iter(paths)
    reading: deque[tuple[Path, Future[Picture]]] = deque()
    try:
        while True:
            ahead = islice(waiting, 2 * max_batch + workers - len(reading))
            reading.extend((path, pool.submit(open_image, path)) for path in ahead)
            if not reading:
                return
            batch = [reading.popleft() for _ in range(min(max_batch, len(reading)))]
            yield from _run_batch(batch, model, settings, draw=draw, tta=tta)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_batch(
    batch: list[tuple[Path, Future[Picture]]], model: OpenModel, settings: Settings, *, draw: bool, tta: Tta
) -> Iterator[Scored]:
    """The results of one batch, in its order; what cannot be read is not run."""
    pictures = [future.result() for _, future in batch if not future.exception()]
    results = zip(pictures, run(pictures, model, tta=tta), strict=True)
    for path, future in batch:
        if error := future.exception():
            if not isinstance(error, (ImageError, OSError)):
                raise error
            yield Scored(path, error)
            continue
        picture, output = next(results)
        if not np.isfinite(output.logits).all():
            yield Scored(path, NotFinite("the model gave no finite answer"))
            continue
        judgement = judged(picture, output, model, settings)
        prediction = Prediction(**prediction_fields(judgement, picture.image, manifest=model.manifest, request_id=""))
        png = evidence(picture, output, judgement, model)[0] if draw else b""
        yield Scored(path, prediction, png)


def _server(options: argparse.Namespace, settings: Settings, workers: int, stack: ExitStack) -> Source:
    """A running server, asked in the background so that it serves everybody else first."""
    from app.client import Client

    key = options.api_key_file.read_text().strip() if options.api_key_file else None
    timeout_s = settings.timeout_ms / 1000

    def connect(**rule: Any) -> Client:
        client = Client(options.url, api_key=key, background=True, timeout_s=timeout_s, **rule)
        return stack.enter_context(client)

    listed = connect().models()
    manifest = next((version.manifest for version in listed.versions if version.served), None)
    if manifest is None:
        raise ValueError(f"{options.url}: cannot read the version that it serves: see dermlens models there")
    rule = _rule(
        settings,
        manifest["version"],
        options.tta,
        manifest["operating_points"],
        manifest.get("abstention", {}),
    )
    # What was asked for is the server's to refuse; a default that its version can make nothing of is left out
    client = connect(
        operating_point=options.operating_point or rule.operating_point or None,
        coverage=options.coverage or rule.coverage or (OFF if settings.coverage == OFF else None),
        tta=options.tta,
    )

    def score(paths: list[Path]) -> Iterator[Scored]:
        for scored in client.score(paths, concurrency=workers, explain=options.overlays is not None):
            outcome = scored.outcome
            png = base64.b64decode(outcome.overlay_png) if isinstance(outcome, Explanation) else b""
            yield Scored(scored.path, outcome, png)

    return Source(rule, manifest["classes"], score)


def _rule(
    settings: Settings, version: str, tta: Tta, operating_points: Iterable[str], coverages: Iterable[str]
) -> Rule:
    """What the rows of this run will say of their rule."""
    point, coverage = settings.operating_point, settings.coverage
    return Rule(version, point if point in operating_points else "", coverage if coverage in coverages else "", tta)


def _say(text: str) -> None:
    """A line on stderr, above the progress bar where there is one."""
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stderr.write(f"{text}\n")
    else:
        tqdm.write(text, file=sys.stderr)


@contextmanager
def _progress(total: int, *, done: int, quiet: bool) -> Iterator[Callable[[], object]]:
    """Shows on a terminal how far a run is; call what it gives after each file. `quiet` where the results show it."""
    try:
        from tqdm import tqdm
    except ImportError:
        numbers = count(done + 1)
        shown = sys.stderr.isatty() and not quiet
        yield lambda: shown and sys.stderr.write(f"\r{next(numbers)} of {total} files\r")
        return
    with tqdm(total=total, initial=done, unit="file", file=sys.stderr, disable=quiet or None) as bar:
        yield bar.update
