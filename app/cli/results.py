"""The rows of `dermlens predict`, and the CSV file that a run goes on with where another one stopped."""

import csv
import fcntl
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from app.model.flips import Tta
from app.model.labels import NOTICE
from app.schemas import Prediction

ABOUT_FILE = ("file", "size_bytes", "modified")
ABOUT_RULE = ("version", "operating_point", "coverage", "tta")
FORMULA_STARTS = (
    "=+-@\t\r\n＝＋－＠'"  # of a cell that a spreadsheet computes (OWASP, CSV injection), and the mark itself
)


@dataclass(frozen=True)
class Rule:
    """What every row of a run is judged by; "" where a version has none."""

    version: str
    operating_point: str
    coverage: str
    tta: str


def row_of(
    path: Path, outcome: Prediction | Exception, overlay: Path | None = None, *, tta: Tta = "none"
) -> dict[str, Any]:
    """One file's result with stable fields, as `--json` prints it; of what failed all but the first two are null."""
    said = ("model", "version", "label", "probabilities", "operating_point", "threshold", "positive", "coverage", "tta")
    referral = ("prediction_set", "refer", "refer_because", "reasons", "out_of_distribution_score")
    about = ("width", "height", "format", "warnings", "overlay", "request_id")
    row: dict[str, Any] = (
        {"file": str(path), "error": None} | dict.fromkeys(said + referral + about) | {"notice": NOTICE}
    )
    if isinstance(outcome, Exception):
        return row | {"error": str(outcome)}
    told = outcome.model_dump(include={"label", "probabilities", "decision", "image", "request_id"})
    novelty = told["decision"].pop("out_of_distribution")
    asked = {
        "model": outcome.model.name,
        "version": outcome.model.version,
        "tta": tta,
        "out_of_distribution_score": novelty and novelty["score"],
        "overlay": overlay and str(overlay),
    }
    return {**row, **told.pop("decision"), **told.pop("image"), **told, **asked}


class Table(AbstractContextManager["Table"]):
    """A CSV file of results that is added to, each row flushed at once; nobody else may add to it meanwhile.

    Opening it repairs it: a last line without its end goes, and so do the rows of files that failed, which will be
    tried again. Each row is one line. `done` tells what need not be computed again.
    """

    def __init__(self, path: Path, classes: Sequence[str], *, restart: bool = False) -> None:
        """Open or create it.

        Raises:
            ValueError: it is another kind of table, or another run is adding to it.
            OSError.
        """
        columns = [name for name in row_of(Path(), ValueError()) if name not in ("file", "notice")]
        at = columns.index("probabilities")
        columns[at : at + 1] = [f"probability_{name}" for name in classes]
        self._columns = [*ABOUT_FILE, *columns]
        self._path = path
        with ExitStack() as opened:
            self._file = opened.enter_context(self._lock(path))
            kept, whole = self._read()
            self._done = {} if restart else {key_of(row): row for row in kept}
            self._found: dict[str, dict[str, str]] = {}  # what `done` saw of a file
            if restart or not whole:
                self._file = opened.enter_context(self._write_anew(self._done.values()))
            self._opened = opened.pop_all()

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def done(self, path: Path, rule: Rule, *, overlay: Path | None) -> bool:
        """Whether the file, as it is now, was judged by this rule before, and drawn where `overlay` says.

        Its row will tell of the file as it is now: one that is changed before it is read is judged again next time.
        """
        about = self._found[str(path)] = about_file(path)
        row = self._done.get((*about.values(), *astuple(rule)))
        return row is not None and (overlay is None or (row["overlay"] == cell(str(overlay)) and overlay.is_file()))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one of `row_of`'s."""
        chances = {f"probability_{name}": value for name, value in (row["probabilities"] or {}).items()}
        about = self._found.get(row["file"]) or about_file(Path(row["file"]))
        self._file.write(self._line({**row, **chances, **about}))
        self._file.flush()

    def _lock(self, path: Path) -> IO[str]:
        file = path.open("a", encoding="utf-8", newline="")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path}: another run is writing to it: wait for it, or give another file") from None
        return file

    def _read(self) -> tuple[list[dict[str, str]], bool]:
        """The rows to keep, and whether the file holds just those."""
        text = self._path.read_bytes().decode(errors="replace")
        lines = text.removeprefix("\ufeff").split("\n")  # a spreadsheet may have put a mark before it
        header = next(csv.reader(lines[:1]), [])
        if len(lines) < 2 and self._line(None).startswith(text):
            return [], False  # new, or torn in its first line
        if header != self._columns:
            raise ValueError(f"{self._path}: has other columns than this run's results: give another file")
        complete = [values for values in csv.reader(lines[1:-1]) if len(values) == len(header)]
        rows = [dict(zip(header, values, strict=True)) for values in complete]
        kept = [row for row in rows if not row["error"]]
        return kept, len(kept) == len(lines) - 2 and not lines[-1]

    def _write_anew(self, rows: Iterable[Mapping[str, str]]) -> IO[str]:
        """Put a file of these rows in place of the other, at once; it is locked, too."""
        part = self._path.with_name(f"{self._path.name}.part")
        part.unlink(missing_ok=True)
        file = self._lock(part)
        file.write(self._line(None))
        file.writelines(self._line(row, escaped=True) for row in rows)
        file.flush()
        os.fsync(file.fileno())
        part.replace(self._path)
        return file

    def _line(self, row: Mapping[str, Any] | None, *, escaped: bool = False) -> str:
        """A row as a line of the file; of None the header."""
        line = io.StringIO()
        values = self._columns if row is None else [row.get(name) for name in self._columns]
        csv.writer(line, lineterminator="\n").writerow(values if escaped else map(cell, values))
        return line.getvalue()


def about_file(path: Path) -> dict[str, str]:
    """The cells that tell a file from another, and from itself once it is changed."""
    try:
        status = path.stat()
        size, modified = str(status.st_size), datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
    except (OSError, ValueError):
        size, modified = "", ""
    return {"file": cell(str(path)), "size_bytes": size, "modified": modified}


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """What a row must share with a file and a rule to be its result."""
    return tuple(row[name] for name in (*ABOUT_FILE, *ABOUT_RULE))


def cell(value: Any) -> str:
    """The text of a value, in one line, which no spreadsheet takes for a formula."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case list():
            return cell("; ".join(value))
    text = str(value).encode(errors="backslashreplace").decode()
    text = text.replace("\r", "\\r").replace("\n", "\\n")
    return f"'{text}" if text.startswith(tuple(FORMULA_STARTS)) else text
