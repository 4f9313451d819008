"""Seconds of fuzzing for each target; `make fuzz` takes an hour."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FUZZ = ROOT / "tests" / "fuzz" / "fuzz.py"


@pytest.mark.parametrize("target", ["decode", "multipart", "v2"])
def test_nothing_that_a_stranger_sends_breaks_it(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ), target, "-max_total_time=6", "-rss_limit_mb=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr


def test_a_crash_is_told(tmp_path: Path) -> None:
    """The check can fail: an input that breaks decoding ends the run with an error and is kept."""
    code = f"""
import runpy, sys
import app.model.preprocess
app.model.preprocess._check = lambda *_: 1 / 0
sys.argv = [{str(FUZZ)!r}, "decode", "-max_total_time=20"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0
    assert list((tmp_path / ".fuzz").glob("decode-crash-*"))
