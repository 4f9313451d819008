"""The audit log: one line per prediction, none of which can be changed, removed or moved unnoticed.

Each record holds the hash of the one before it and its own, both HMAC-SHA256 under a key derived from the secret
(hash chain of Schneier and Kelsey, "Secure audit logs", 1999, with one key for all records).
"""

import fcntl
import glob
import hmac
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

MIN_SECRET = 32  # bytes
START = "0" * 64  # what the first record names as the hash before it


class AuditBroken(Exception):
    """The log is not as it was written; the message names the file, the line and what is wrong."""


class AuditLocked(Exception):
    """Another server writes this log."""


class AuditFailed(Exception):
    """A record could not be written."""


@dataclass(frozen=True)
class Summary:
    """What a sound log holds."""

    records: int
    files: int
    first: str | None  # times, ISO 8601
    last: str | None


class Secret:
    """The two keys of a log, derived from the content of its key file; raises ValueError where that is too short."""

    def __init__(self, content: bytes) -> None:
        if len(content) < MIN_SECRET:
            raise ValueError(f"the audit key file holds {len(content)} bytes: give {MIN_SECRET} random ones or more")
        self._images, self._chain = (hmac.digest(content, b"dermlens audit " + use, "sha256") for use in (b"i", b"c"))

    def of_image(self, image: bytes) -> str:
        """What stands for an image file in the log: says nothing without the secret."""
        return hmac.digest(self._images, image, "sha256").hex()

    def of_record(self, text: bytes) -> str:
        return hmac.digest(self._chain, text, "sha256").hex()


class AuditLog:
    """Appends to `path`; a file that would grow over `max_bytes` becomes `path.1`, that `path.2`, up to `keep`.

    `path.head` holds the number and hash of the last record that was answered for, so that a cut tail is noticed.

    Raises:
        AuditLocked, or AuditBroken: the newest file was tampered with, or cut.
        OSError: the files cannot be opened.
    """

    def __init__(self, path: Path, secret: Secret, *, max_bytes: int = 10_000_000, keep: int = 100) -> None:
        self._path, self._secret, self._keep = path, secret, keep
        self._max_bytes = sys.maxsize  # until a torn line is recovered, which must happen in its own file
        self._lock = Lock()
        self._number, self._hash, self._answered = 0, START, 0
        self._failures = 0  # since the last record
        self._head = _open(_beside(path, "head"))
        try:
            fcntl.flock(self._head, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Two files, since the newest may be empty, or hold a torn line alone
            for record, digest in _read(path, secret, newest=2):
                self._number, self._hash = record["number"], digest
            self._file = _open(path)
        except BlockingIOError:
            os.close(self._head)
            raise AuditLocked(f"{path}: another server writes this audit log: give each its own") from None
        except BaseException:
            os.close(self._head)
            raise
        os.fdatasync(self._file)  # the head is never ahead of what is on the disk
        os.pwrite(self._head, _head_line(self._number, self._hash, secret), 0)
        _sync_folder(path)
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        if torn := content[self._size :]:
            # Written over the torn line, which it holds and so is longer than: nothing of it is left or lost
            self._append({"event": "recovered", "torn": torn.decode(errors="backslashreplace")})
        self._max_bytes = max_bytes

    def append(self, image: bytes, **fields: Any) -> int:
        """Record a prediction before it is answered, and return the record's number; for threads, not the event loop.

        The record is on the disk when this returns (fdatasync); threads share that wait.

        Raises:
            AuditFailed: it is not, so the prediction must not be answered.
        """
        return self._append({"event": "prediction", "image": self._secret.of_image(image), **fields})

    def ready(self) -> bool:
        """Whether records can be written; after a failure, by writing one that says how many failed."""
        try:
            return not self._failures or self._append({"event": "resumed", "failed": self._failures}) > 0
        except AuditFailed:
            return False

    def close(self) -> None:
        """Let another server have the log."""
        os.close(self._file)
        os.close(self._head)

    def _append(self, fields: dict[str, Any]) -> int:
        try:
            with self._lock:
                number, digest = self._write(fields)
                written = os.dup(self._file)  # the file may be rotated while this thread waits for the disk
            try:
                os.fdatasync(written)
            finally:
                os.close(written)
            with self._lock:
                if number > self._answered:
                    self._answered = number
                    os.pwrite(self._head, _head_line(number, digest, self._secret), 0)
                self._failures = 0
        except OSError as error:
            self._failures += 1
            raise AuditFailed("the server cannot record its answers: try another replica") from error
        return number

    def _write(self, fields: dict[str, Any]) -> tuple[int, str]:
        number, time = self._number + 1, datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"number": number, "time": time, **fields, "previous": self._hash}
        text = json.dumps(record, allow_nan=False).encode()
        digest = self._secret.of_record(text)
        line = _record_line(text, digest)
        if self._size and self._size + len(line) > self._max_bytes:
            self._rotate()
        if (done := os.pwrite(self._file, line, self._size)) < len(line):
            os.ftruncate(self._file, self._size)
            raise OSError(f"{done} of {len(line)} bytes written: the disk is full")
        self._size += len(line)
        self._number, self._hash = number, digest
        return number, digest

    def _rotate(self) -> None:
        os.fdatasync(self._file)
        # Else an earlier try ended half-way, and trying again would push out the oldest files for nothing
        if self._path.exists():
            for n in range(self._keep, 0, -1):
                younger = _beside(self._path, n - 1) if n > 1 else self._path
                if younger.exists():
                    younger.replace(_beside(self._path, n))
        fresh = _open(self._path)
        os.close(self._file)
        self._file, self._size = fresh, 0
        _sync_folder(self._path)


def verify(path: Path, secret: Secret) -> Summary:
    """Check every record, also of a log that is being written; a last line without its end is not counted.

    Raises:
        AuditBroken: at the first record that is wrong.
    """
    records, first, last = 0, None, None
    for record, _ in _read(path, secret):
        records, first, last = records + 1, first or record["time"], record["time"]
    return Summary(records, sum(name.exists() for name in _names(path)), first, last)


def find(path: Path, secret: Secret, image: bytes) -> list[dict[str, Any]]:
    """The records of an image file; raises as `verify`."""
    wanted = secret.of_image(image)
    return [record for record, _ in _read(path, secret) if record.get("image") == wanted]


def _read(path: Path, secret: Secret, *, newest: int | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Each record of the newest files with its hash, oldest first, checked against the one before and the head."""
    head = _beside(path, "head")
    answered, digest_then = _read_head(head, secret)  # before the files, which may grow meanwhile
    number, digest, place = None, START, str(path)
    with ExitStack() as stack:
        rotated = True
        while rotated:  # meanwhile: then a newer file may lie where an older one was
            stack.close()
            opened: dict[int, BinaryIO] = {}
            before_it = _inode(path)
            # Newest first, and each once: a rotation that begins moves a file to the next name
            for name in _names(path):
                with suppress(FileNotFoundError):
                    entered = stack.enter_context(name.open("rb"))
                    opened.setdefault(os.fstat(entered.fileno()).st_ino, entered)
            rotated = _inode(path) != before_it
        files = list(opened.values())[:newest][::-1]
        for file in files:
            for n, line in enumerate(file, 1):
                place = f"{file.name}, line {n}"
                if not line.endswith(b"\n") and file is files[-1]:
                    break  # torn, or still being written
                text = line.rpartition(b', "hash": "')[0] + b"}"
                before, digest = digest, secret.of_record(text)
                if line != _record_line(text, digest):
                    raise AuditBroken(f"{place}: the line was changed, or the log has another key")
                record = json.loads(text)
                if number is not None and record["previous"] != before:
                    raise AuditBroken(f"{place}: record {record['number']} does not follow on {number}")
                number = record["number"]
                if number == answered and digest != digest_then:
                    raise AuditBroken(f"{place}: record {number} is not the one that {head} names")
                yield record, digest
    if (number or 0) < answered:
        raise AuditBroken(f"{place}: the log ends with record {number or 0}, but {answered} were written")
    if answered < 0 <= (number or -1):
        raise AuditBroken(f"{head}: is missing, so nobody can tell whether the log was cut")


def _read_head(head: Path, secret: Secret) -> tuple[int, str]:
    """Number and hash of the last record that was answered for; -1 where nothing was ever written."""
    content = head.read_bytes() if head.exists() else b""
    if not content:
        return -1, START
    number, digest = int(content[:20]) if content[:20].isdigit() else 0, content[21:85].decode(errors="replace")
    if content != _head_line(number, digest, secret):
        raise AuditBroken(f"{head}: the file was changed, or the log has another key")
    return number, digest


def _head_line(number: int, digest: str, secret: Secret) -> bytes:
    """Always as long, so that it can be written in place."""
    text = f"{number:020} {digest}"
    return f"{text} {secret.of_record(text.encode())}\n".encode()


def _record_line(text: bytes, digest: str) -> bytes:
    return text[:-1] + f', "hash": "{digest}"}}\n'.encode()


def _names(path: Path) -> list[Path]:
    """What the files of a log may be called, newest first."""
    turned = path.parent.glob(f"{glob.escape(path.name)}.*")
    last = max((int(file.suffix[1:]) for file in turned if file.suffix[1:].isdecimal()), default=0)
    return [path, *(_beside(path, n) for n in range(1, last + 2))]  # one more, should a rotation come between


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def _beside(path: Path, suffix: str | int) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _sync_folder(path: Path) -> None:
    """Make new and renamed files survive a power cut."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
