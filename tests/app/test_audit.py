import base64
import json
import os
import resource
import secrets
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.audit import AuditBroken, AuditLocked, AuditLog, Secret, find, verify
from tests.conftest import ROOT

SECRET = Secret(b"k" * 32)
FIELDS = {"request_id": "r", "label": "benign", "probabilities": {"benign": 0.9, "malignant": 0.1}, "refer": False}


@contextmanager
def writing(path: Path, *, secret: Secret = SECRET, **limits: Any) -> Iterator[AuditLog]:
    log = AuditLog(path, secret, **limits)
    try:
        yield log
    finally:
        log.close()


def write(path: Path, images: range | list[bytes], **limits: Any) -> None:
    with writing(path, **limits) as log:
        for image in images:
            log.append(image if isinstance(image, bytes) else bytes([image]), **FIELDS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_says_what_was_answered_and_hides_the_image(tmp_path: Path) -> None:
    path, image = tmp_path / "audit.log", secrets.token_bytes(1000)
    write(path, [image])
    [record] = lines(path)
    assert record | FIELDS == record
    assert record["number"] == 1
    assert record["event"] == "prediction"
    for revealing in (image.hex(), base64.b64encode(image).decode()):
        assert revealing not in path.read_text()
    with writing(tmp_path / "other.log", secret=Secret(b"q" * 32)) as other:
        other.append(image)
    assert lines(tmp_path / "other.log")[0]["image"] != record["image"]  # no key, no telling


def test_every_record_of_an_image_can_be_found_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, [b"one", b"two", b"one"])
    assert [record["number"] for record in find(path, SECRET, b"one")] == [1, 3]
    assert find(path, SECRET, b"three") == []


def test_a_sound_log_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(5))
    summary = verify(path, SECRET)
    assert (summary.records, summary.files) == (5, 1)
    assert (summary.first, summary.last) == (lines(path)[0]["time"], lines(path)[-1]["time"])


def test_a_log_that_was_never_written_is_sound_and_empty(tmp_path: Path) -> None:
    write(tmp_path / "audit.log", [])
    assert verify(tmp_path / "audit.log", SECRET).records == 0


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(2))
    write(path, range(2))
    assert [record["number"] for record in lines(path)] == [1, 2, 3, 4]
    assert verify(path, SECRET).records == 4


def test_files_are_turned_over_by_size_and_the_chain_goes_across_them(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(20), max_bytes=2000, keep=50)
    assert path.stat().st_size <= 2000
    assert verify(path, SECRET).records == 20
    assert verify(path, SECRET).files == len(list(tmp_path.glob("audit.log*"))) - 1 > 3  # less the head
    write(path, range(20), max_bytes=2000, keep=50)
    assert verify(path, SECRET).records == 40


def test_no_more_files_than_asked_for_are_kept_and_the_rest_still_verifies(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(40), max_bytes=2000, keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "audit.log",
        "audit.log.1",
        "audit.log.2",
        "audit.log.head",
    ]
    assert verify(path, SECRET).records == sum(
        len(lines(file)) for file in tmp_path.iterdir() if file.suffix != ".head"
    )


def test_a_start_after_a_crash_between_two_files_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(3))
    path.rename(tmp_path / "audit.log.1")  # the crash came before the new file
    write(path, range(3))
    assert verify(path, SECRET).records == 6


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda old: [*old[:1], old[1].replace(b"benign", b"Benign", 1), *old[2:]], "line 2: the line was changed"),
        (lambda old: [*old[:1], old[1].replace(b'"r"', b'"r" '), *old[2:]], "line 2: the line was changed"),
        (lambda old: [*old[:1], *old[2:]], "line 2: record 3 does not follow on 1"),
        (lambda old: [old[1], old[0], *old[2:]], "line 2: record 1 does not follow on 2"),
        (lambda old: [*old[:2], old[1], *old[2:]], "line 3: record 2 does not follow on 2"),
        (lambda old: [*old[:1], b"\n", *old[1:]], "line 2: the line was changed"),
        (lambda old: [*old[:1], b"\xff\n", *old[1:]], "line 2: the line was changed"),
        (lambda old: old[:-1], "ends with record 3, but 4 were written"),
        (lambda old: [*old[:-1], old[-1][:-20]], "ends with record 3, but 4 were written"),
        (lambda _: [], "ends with record 0, but 4 were written"),
    ],
    ids=["word", "blank", "removed", "swapped", "twice", "empty line", "bytes", "cut", "torn by hand", "emptied"],
)
def test_tampering_is_found_by_verify_and_at_the_next_start(tmp_path: Path, tamper: Any, told: str) -> None:
    path = tmp_path / "audit.log"
    write(path, range(4))
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(AuditBroken, match=told):
        verify(path, SECRET)
    with pytest.raises(AuditBroken, match=told):
        AuditLog(path, SECRET)


def test_a_file_that_was_removed_from_the_middle_or_the_end_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(20), max_bytes=2000)
    (tmp_path / "audit.log.2").rename(tmp_path / "elsewhere")
    with pytest.raises(AuditBroken, match=r"audit.log.1, line 1: record \d+ does not follow on"):
        verify(path, SECRET)
    (tmp_path / "elsewhere").rename(tmp_path / "audit.log.2")
    path.unlink()
    with pytest.raises(AuditBroken, match="but 20 were written"):
        verify(path, SECRET)


def test_a_head_that_is_missing_forged_or_anothers_is_noticed(tmp_path: Path) -> None:
    path, head = tmp_path / "audit.log", tmp_path / "audit.log.head"
    write(path, range(3))
    true = head.read_bytes()
    second = lines(path)[1]
    head.write_bytes(f"{2:020} {second['hash']} ".encode() + true[86:])
    with pytest.raises(AuditBroken, match=r"head: the file was changed"):
        verify(path, SECRET)
    head.write_bytes(b"nonsense")
    with pytest.raises(AuditBroken, match=r"head: the file was changed"):
        AuditLog(path, SECRET)
    head.unlink()
    with pytest.raises(AuditBroken, match=r"head: is missing"):
        verify(path, SECRET)
    write(tmp_path / "twin.log", range(3))
    head.write_bytes((tmp_path / "twin.log.head").read_bytes())
    with pytest.raises(AuditBroken, match="record 3 is not the one"):
        verify(path, SECRET)


def test_another_key_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "audit.log", range(2))
    with pytest.raises(AuditBroken, match="another key"):
        verify(tmp_path / "audit.log", Secret(b"q" * 32))
    with pytest.raises(ValueError, match="holds 31 bytes"):
        Secret(b"k" * 31)


@pytest.mark.parametrize("torn", [b'{"number": 4, "ti', b"\0" * 300, b"\xff\x80"], ids=["text", "zeros", "bytes"])
def test_a_line_torn_by_a_power_cut_is_no_tampering_and_is_kept_in_a_record_of_its_own(
    tmp_path: Path, torn: bytes
) -> None:
    path = tmp_path / "audit.log"
    write(path, range(3))
    with path.open("ab") as file:
        file.write(torn)
    assert verify(path, SECRET).records == 3
    write(path, range(1))
    assert [record["event"] for record in lines(path)] == ["prediction"] * 3 + ["recovered", "prediction"]
    assert lines(path)[3]["torn"] == torn.decode(errors="backslashreplace")
    assert verify(path, SECRET).records == 5


def test_a_torn_line_is_recovered_in_its_own_file_however_full_that_is(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    write(path, range(3))
    with path.open("ab") as file:
        file.write(b"torn")
    write(path, range(1), max_bytes=path.stat().st_size)
    assert [record["event"] for record in lines(tmp_path / "audit.log.1")][-1] == "recovered"
    assert verify(path, SECRET).records == 5


def test_a_record_that_the_head_does_not_name_yet_is_no_tampering(tmp_path: Path) -> None:
    path, head = tmp_path / "audit.log", tmp_path / "audit.log.head"
    write(path, range(2))
    behind = head.read_bytes()
    write(path, range(1))
    head.write_bytes(behind)  # the process was killed between the two
    assert verify(path, SECRET).records == 3
    write(path, range(1))
    assert verify(path, SECRET).records == 4


def test_a_second_writer_is_told_so_and_can_follow_the_first(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with writing(path), pytest.raises(AuditLocked, match="another server writes this audit log"):
        AuditLog(path, SECRET)
    write(path, range(1))


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "audit.log", range(20), max_bytes=2000)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_threads_append_at_once_while_it_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    with writing(path, max_bytes=5000) as log, ThreadPoolExecutor(8) as pool:
        appended = [pool.submit(log.append, bytes([n]), **FIELDS) for n in range(200)]
        while not all(one.done() for one in appended):
            verify(path, SECRET)
    assert sorted(one.result() for one in appended) == list(range(1, 201))
    assert verify(path, SECRET).records == 200


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from app.audit import AuditFailed, AuditLog, Secret, verify
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file over the limit is then an error, as a full disk is
    path, secret = Path(sys.argv[1]), Secret(b"k" * 32)
    log, answered = AuditLog(path, secret), 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        while True:
            log.append(b"image")
            answered += 1
    except AuditFailed:
        pass
    assert answered
    assert not log.ready()
    assert verify(path, secret).records == answered
    assert path.read_bytes().endswith(b"\\n"), "half a line was left"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert log.ready()
    log.append(b"image")
    print(answered, verify(path, secret).records)
"""


def test_a_full_disk_fails_the_append_and_readiness_returns_with_room(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "audit.log"
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr
    answered, records = map(int, done.stdout.split())
    assert records == answered + 2
    resumed = lines(path)[answered]
    assert (resumed["event"], resumed["failed"]) == ("resumed", 2)  # the append, and the first look at readiness


ENDLESS = """
    import sys
    from pathlib import Path
    from app.audit import AuditLog, Secret
    log = AuditLog(Path(sys.argv[1]), Secret(b"k" * 32))
    while True:
        print(log.append(b"image"), flush=True)
"""


def test_a_server_that_is_killed_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS), str(path)]
    for _ in range(3):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            answered = [process.stdout.readline() for _ in range(20)]
            process.kill()
        assert verify(path, SECRET).records >= int(answered[-1])
    write(path, range(1))


def test_an_answer_that_cannot_be_written_as_json_is_refused(tmp_path: Path) -> None:
    with writing(tmp_path / "audit.log") as log:
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.append(b"image", probability=float("nan"))
        log.append(b"image")
    assert verify(tmp_path / "audit.log", SECRET).records == 1


def test_a_log_that_cannot_be_opened_says_which(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        AuditLog(tmp_path / "nowhere" / "audit.log", SECRET)
