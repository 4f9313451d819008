import platform
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import main

# Eight threads that hold memory too small to be mapped on its own, and how many heaps it lies in
PROGRAM = """
import ctypes, sys, threading
from app.memory import give_back, one_arena
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fclose.argtypes, libc.malloc_info.argtypes = [ctypes.c_void_p], [ctypes.c_int, ctypes.c_void_p]
if sys.argv[1] == "one":
    one_arena()
together = threading.Barrier(9)

def hold():
    libc.malloc(10_000)
    together.wait()
    together.wait()

threads = [threading.Thread(target=hold) for _ in range(8)]
[thread.start() for thread in threads]
together.wait()
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
together.wait()
give_back()
print(open(sys.argv[2]).read().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(("arenas", "only"), [("one", True), ("default", False)])
def test_all_threads_allocate_from_one_arena(arenas: str, only: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, arenas, str(tmp_path / "info.xml")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (int(found) == 1) is only


def test_the_server_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def stop(*_: object, **__: object) -> None:
        called.append("app")
        sys.exit(3)

    monkeypatch.setattr("app.memory.one_arena", lambda: called.append("one"))
    monkeypatch.setattr("app.cli.serve.create_app", stop)
    with pytest.raises(SystemExit, match="3"):
        main(["serve"])
    assert called == ["one", "app"]
