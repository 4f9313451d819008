"""The store on a damaged disk, under kill -9 and power cuts, and in a race. As a script, it forks what is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from app.model import store
from app.model.store import VersionDamaged, VersionExists, VersionMissing

NAME = "asff-resnet50"  # tests.conftest loads torch, which a script that forks must not
FILES = ("1/manifest.json", "1/weights.safetensors", "1/report/a.txt")
NO_NAMES = ("", ".", "..", "../1", "/etc/passwd", "1/../1", "1\0", "1\n2", " 1", "\udc80", "current", "1" * 65)

Publish = Callable[..., Path]


def served(root: Path) -> store.LoadedVersion:
    return store.load(root, NAME, store.current(root, NAME))


def refusal(use: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message of a version that is missing or damaged, which is one line for a terminal or a log."""
    with pytest.raises((VersionMissing, VersionDamaged)) as caught:
        use(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) > 20
    return message


@pytest.fixture
def root(small_store: Publish) -> Path:
    """Versions 1 and 2, of which 1 is current and replaced 2."""
    root = small_store("1", "2")
    store.promote(root, NAME, "2")
    store.promote(root, NAME, "1")
    return root


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: append(path, b"\0"),
    "a folder": replace_by_folder,
    "a link to itself": replace_by_loop,
}


def damages(*files: str) -> list[tuple[str, str]]:
    """Each damage to each file; the first line alone of `current` or `previous` is a whole one."""
    both = [(file, damage) for file in files for damage in DAMAGES]
    return [(file, damage) for file, damage in both if "/" in file or damage != "cut short"]


@pytest.mark.parametrize(("file", "damage"), damages("current", *FILES))
def test_a_damaged_file_is_refused_in_one_line_and_the_other_version_still_serves(
    root: Path, file: str, damage: str
) -> None:
    DAMAGES[damage](root / NAME / file)
    refusal(served, root)
    if (file, damage) == ("current", "a folder"):
        return  # which no rename replaces
    store.promote(root, NAME, "2")
    assert served(root).manifest.version == "2"


def test_a_file_that_grew_beyond_all_memory_is_refused_unread(root: Path) -> None:
    os.truncate(root / NAME / "1" / store.WEIGHTS, 1 << 43)
    assert "is not the published file" in refusal(served, root)


@pytest.mark.parametrize("file", [*FILES, "1/manifest.json.sha256"])
def test_one_flipped_bit_is_refused_wherever_it_is(root: Path, file: str) -> None:
    path = root / NAME / file
    published = path.read_bytes()
    for index in range(0, len(published), 7):
        flipped = published[index] ^ 1 << index % 8
        path.write_bytes(published[:index] + bytes([flipped]) + published[index + 1 :])
        refusal(store.load, root, NAME, "1")
    path.write_bytes(published)
    store.load(root, NAME, "1")


def test_a_flipped_bit_of_current_is_refused_or_harmless(root: Path) -> None:
    path = root / NAME / "current"
    for bit in range(16):
        flipped = bytearray(b"1\n")
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if flipped != b"1\v":  # white space too
            refusal(served, root)


@pytest.mark.parametrize(
    "content", [b"\n", b"../1", b"/etc/passwd", b"1\0", b"1\n2\n", b"\xff\xfe1", b"..", b"current", b"1" * 100_000]
)
def test_a_current_that_names_no_version_is_damaged(root: Path, content: bytes) -> None:
    (root / NAME / "current").write_bytes(content)
    for use in (store.current, store.previous, store.rollback):
        message = refusal(use, root, NAME)
        assert "names no version" in message
        assert len(message) < 300


@pytest.mark.parametrize("version", NO_NAMES)
def test_a_name_that_could_lead_elsewhere_becomes_no_path(root: Path, version: str) -> None:
    for use in (store.read_manifest, store.verify, store.load, store.promote):
        assert "can name no model and no version" in refusal(use, root, NAME, version)
        assert "can name no model and no version" in refusal(use, root, version, "1")
    for of_model in (store.versions, store.current, store.previous, store.rollback):
        assert "can name no model and no version" in refusal(of_model, root, version)
    assert "can name no model and no version" in refusal(store.prune, root, version, keep=1)
    assert store.current(root, NAME) == "1"


def edit(root: Path, **changes: object) -> None:
    """As if version 1 had been published so."""
    path = root / NAME / "1" / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / store.CHECKSUM).unlink()


def test_a_manifest_of_a_newer_schema_says_what_to_do_whatever_else_is_in_it(root: Path) -> None:
    edit(root, schema_version=99, name=7, new_in_99={})
    assert "schema 99 is newer than" in refusal(served, root)


def test_an_unknown_field_is_named_even_where_its_name_is_two_lines(root: Path) -> None:
    edit(root, **{"sur\nprise": 1})
    assert "sur prise: Extra inputs are not permitted" in refusal(served, root)


def test_a_file_record_of_another_size_is_refused(root: Path) -> None:
    records = json.loads((root / NAME / "1" / store.MANIFEST).read_text())["files"]
    for size in (0, 10**30):
        records["report/a.txt"]["size"] = size
        (root / NAME / "1" / store.CHECKSUM).touch()
        edit(root, files=records)
        assert "a.txt is not the published file" in refusal(served, root)


@pytest.mark.parametrize("file", ["../2/report/a.txt", "/etc/passwd", "a\0b", "a\nb"])
def test_a_file_record_outside_the_folder_is_refused(root: Path, file: str) -> None:
    records = json.loads((root / NAME / "1" / store.MANIFEST).read_text())["files"]
    edit(root, files=records | {file: records["report/a.txt"]})
    assert "outside its folder" in refusal(served, root)


@pytest.mark.parametrize("what", [*FILES, "1/report", "1"])
def test_a_link_out_of_the_folder_is_refused_though_it_leads_to_the_same_bytes(root: Path, what: str) -> None:
    path = root / NAME / what
    elsewhere = root / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert "outside its folder" in refusal(served, root)


def test_a_store_behind_a_link_serves(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert served(tmp_path / "link").manifest.version == "1"


@pytest.mark.parametrize(("file", "damage"), damages("previous", *(file.replace("1/", "2/") for file in FILES)))
def test_a_rollback_to_what_is_damaged_leaves_current(root: Path, file: str, damage: str) -> None:
    DAMAGES[damage](root / NAME / file)
    refusal(store.rollback, root, NAME)
    assert served(root).manifest.version == "1"


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"1\n", b"1 2 3\n", b"1 ../2\n", b"1 /etc\n", b"1 \0\n", b"1 1\n2 1"]
)
def test_a_damaged_previous_is_repaired_by_promoting_a_version(root: Path, content: bytes) -> None:
    (root / NAME / "previous").write_bytes(content)
    if not content.startswith(b"1 1"):
        refusal(store.rollback, root, NAME)
    store.promote(root, NAME, "2")
    assert store.rollback(root, NAME) == "1"


class Operation(NamedTuple):
    """What a killed process was doing."""

    run: Callable[[Path], object]
    current: dict[str | None, str]  # current after the kill -> current after the operation has run again
    versions: list[str]  # in the end
    previous: Mapping[str, str] = MappingProxyType({})  # current after the kill -> where a rollback then goes


def publish(root: Path, version: str, like: Path) -> None:
    manifest = store.read_manifest(like.parent.parent, like.parent.name, like.name)
    files = {file: (like / file).read_bytes() for file in manifest.files}
    store.publish(root, manifest.model_copy(update={"version": version}), files)


def begin(root: Path) -> None:
    with suppress(VersionExists):
        publish(root / "new", "1", root / NAME / "1")
    store.promote(root / "new", NAME, "1")


OPERATIONS = {
    "publish": Operation(lambda root: publish(root, "5", root / NAME / "1"), {"2": "2"}, ["1", "2", "3", "4", "5"]),
    "promote": Operation(
        lambda root: store.promote(root, NAME, "3"),
        {"2": "3", "3": "3"},
        ["1", "2", "3", "4"],
        previous={"2": "1", "3": "2"},
    ),
    "rollback": Operation(
        lambda root: store.rollback(root, NAME),
        {"2": "1", "1": "2"},
        ["1", "2", "3", "4"],
        previous={"2": "1", "1": "2"},
    ),
    "prune": Operation(lambda root: store.prune(root, NAME, keep=0), {"2": "2"}, ["1", "2"], previous={"2": "1"}),
    "begin": Operation(begin, {None: "1", "1": "1"}, ["1"]),
}


@pytest.fixture
def killing_ground(small_store: Publish) -> Path:
    """Versions 1 to 4, of which 2 is current and replaced 1; and an empty store `new`."""
    root = small_store("1", "2", "3", "4")
    (root / "new").mkdir()
    store.promote(root, NAME, "1")
    store.promote(root, NAME, "2")
    return root


def run_script(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "tests.app.model.test_store_faults", *map(str, arguments)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("end", ["kill", "power-cut"])
def test_a_kill_or_a_power_cut_at_any_step_leaves_a_whole_store(
    killing_ground: Path, operation: str, end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_script(operation, end, killing_ground, tmp_path_factory.mktemp("killed"))


def test_of_processes_that_publish_the_same_version_one_wins(killing_ground: Path) -> None:
    run_script("race", killing_ground)


def moved(path: str, old: str, new: str) -> str:
    """Where a path is after `old` was renamed to `new`."""
    return new + path.removeprefix(old) if Path(path).is_relative_to(old) else path


class Death:
    """Kills this process just before its Nth change to the file system; a power cut loses what was not synced by then.

    A rename is never lost: journalling file systems keep renames in their order.
    """

    def __init__(self, at: int, *, power_cut: bool) -> None:
        self._left = at
        self._power_cut = power_cut
        self._contents: set[str] = set()  # files whose bytes are not on disk
        self._entries: set[str] = set()  # files and folders whose own folder does not have them on disk

    def install(self) -> None:
        os.fsync = self._fsync  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._step()
            path = os.fspath(arguments[0])
            self._contents.add(path)
            if not os.path.lexists(path):
                self._entries.add(path)
        elif event == "os.mkdir":
            self._step()
            if not os.path.lexists(arguments[0]):
                self._entries.add(os.fspath(arguments[0]))
        elif event == "os.rename":  # os.replace too
            self._step()
            old, new = map(os.fspath, arguments[:2])
            self._entries.discard(old)
            self._contents = {moved(path, old, new) for path in self._contents}
            self._entries = {moved(path, old, new) for path in self._entries}
        elif event in ("os.remove", "os.rmdir"):
            self._step()

    def _fsync(self, descriptor: int) -> None:  # SIGKILL loses nothing that is in the page cache, so nothing to do
        self._step()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._contents.discard(path)
        self._entries = {entry for entry in self._entries if os.path.dirname(entry) != path}

    def _step(self) -> None:
        self._left -= 1
        if not self._left:
            self.lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def lose(self) -> None:
        if not self._power_cut:
            return
        for path in self._contents:
            with suppress(FileNotFoundError):
                os.truncate(path, 0)
        for path in sorted(self._entries, reverse=True):
            shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)


def fork(work: Callable[[], int | None]) -> int:
    """The id of a child that ends with what `work` returns, or with 1 where it raises."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(work() or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def die_at_every_step(operation: Operation, template: Path, scratch: Path, *, power_cut: bool) -> None:
    new = "new" if None in operation.current else ""
    before = check(template / new)
    seen = set()
    for step in count(1):
        root = scratch / str(step)
        shutil.copytree(template, root)

        def run(root: Path = root, step: int = step) -> None:
            death = Death(step, power_cut=power_cut)
            death.install()
            operation.run(root)
            death.lose()  # what has returned stays

        ended = os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1])
        seen.add(check(root / new))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, f"step {step} ended with {ended}"
        check_next(operation, root, root / new)
    assert check(root / new) == (operation.current[before.current], tuple(operation.versions))
    assert {state.current for state in seen} == set(operation.current), seen
    print(f"{step - 1} steps, {len(seen)} states")


class State(NamedTuple):
    current: str | None
    versions: tuple[str, ...]


def check(root: Path) -> State:
    """Every version that the store lists is whole, and the current one is among them."""
    listed = tuple(store.versions(root, NAME))
    for version in listed:
        store.verify(root, NAME, version)
    try:
        current = store.current(root, NAME)
    except VersionMissing:
        return State(None, listed)
    store.load(root, NAME, current)
    return State(current, listed)


def check_next(operation: Operation, root: Path, changed: Path) -> None:
    """After a kill a rollback goes where it should, and the operation runs again."""
    before = check(changed)
    if operation.previous:
        assert before.current
        copy = root.with_name(f"{root.name}-copy")
        shutil.copytree(changed, copy)
        assert store.rollback(copy, NAME) == operation.previous[before.current]
    try:
        operation.run(root)
    except VersionExists:
        assert before.versions == tuple(operation.versions)
    assert check(changed) == (operation.current[before.current], tuple(operation.versions))
    assert not list((changed / NAME).glob(".*.partial"))


def race(root: Path, rounds: int = 20) -> None:
    """Three publish the same version, each with other weights, while one prunes."""
    for version in map(str, range(5, 5 + rounds)):
        waiting, start = os.pipe()

        def compete(like: str, version: str = version, waiting: int = waiting, start: int = start) -> int:
            os.close(start)
            os.read(waiting, 1)  # ends when the parent closes its end
            try:
                publish(root, version, root / NAME / like)
            except VersionExists:
                return 3
            return 0

        def prune(waiting: int = waiting, start: int = start) -> None:
            os.close(start)
            os.read(waiting, 1)
            store.prune(root, NAME, keep=1000)

        children = {fork(lambda like=like: compete(like)): like for like in ("1", "2", "3")}  # type: ignore[misc]
        children[fork(prune)] = "prune"
        os.close(waiting)
        os.close(start)
        ends = {children[child]: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        assert ends.pop("prune") == 0
        assert Counter(ends.values()) == {0: 1, 3: 2}, ends
        winner = next(like for like, end in ends.items() if end == 0)
        assert store.load(root, NAME, version).weights["w"][0] == float(winner)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # noqa: ARG005 - the tests kill processes, and the disk forgets nothing
    if sys.argv[1] == "race":
        race(Path(sys.argv[2]))
    else:
        what, end, *folders = sys.argv[1:]
        die_at_every_step(OPERATIONS[what], *map(Path, folders), power_cut=end == "power-cut")
