"""Every block of docs/tutorials is run in its order, in a copy of the repository, but those that say they are not."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.answers import environment, free_port
from tests.conftest import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(bash|python)( not-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDED = ("app", "training", "tests", "docs", "model_store", "pyproject.toml")
TOLD = {
    "researcher": ["and is current", '"name":"clinic","version":"1"', '"harmless":', '"suspicious":'],
    "operator": ['"status":401', 'dermlens_shadow_pairs_total{shadow="100"', '"version":"100"', "is current again"],
    "developer": ["2 passed", "1 passed", "docs/images/drawn.png: benign"],
}


@pytest.fixture
def repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for entry in NEEDED:
            if (ROOT / entry).is_dir():
                shutil.copytree(ROOT / entry, Path(name, entry), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / entry, name)
        yield Path(name)


def script(tutorial: str, *, port: int) -> str:
    """The blocks that are run, as one script that tells which it is at."""
    # A block that fails may leave a server
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for number, (language, skipped, code) in enumerate(BLOCK.findall(tutorial), start=1):
        if not skipped:
            lines.append(f"echo 'block {number}'")
            lines.append(f"python - <<'PYTHON'\n{code}PYTHON" if language == "python" else code)
    return "\n".join(lines).replace("127.0.0.1:8000", f"127.0.0.1:{port}")


def test_each_tutorial_is_run() -> None:
    assert {path.stem for path in TUTORIALS.iterdir()} == TOLD.keys()


@pytest.mark.skipif(not os.environ.get("DERMLENS_TUTORIALS"), reason="takes minutes: make tutorials")
@pytest.mark.parametrize("name", TOLD)
def test_a_tutorial_does_what_it_says(name: str, repository: Path) -> None:
    port = free_port()
    shell = subprocess.Popen(
        ["bash", "-c", script((TUTORIALS / f"{name}.md").read_text(), port=port)],  # noqa: S607 - bash from the path
        cwd=repository,
        env=environment(DERMLENS_PORT=str(port), PYTHONPATH=str(repository), OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = shell.communicate(timeout=280)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, told[-4000:]
    for text in TOLD[name]:
        assert text in told, (text, told[-4000:])


@pytest.mark.parametrize("name", TOLD)
def test_what_is_not_run_says_so(name: str) -> None:
    tutorial = (TUTORIALS / f"{name}.md").read_text()
    assert len(BLOCK.findall(tutorial)) == tutorial.count("\n```") / 2  # none is of another kind
    for block in BLOCK.finditer(tutorial):
        paragraph = tutorial[: block.start()].rstrip().rsplit("\n\n", 1)[-1]
        assert ("Not run by the suite" in paragraph) == bool(block[2]), block[0]
