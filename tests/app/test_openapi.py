"""The server does what its OpenAPI description says: every check of schemathesis, over HTTP."""

import os
import subprocess
import sys
from pathlib import Path

from app.security import new_key
from tests.app.test_serve import serving
from tests.conftest import ROOT

# Bytes that are no image of the type that they are sent as are within the description, and refused; a deadline of a few
# milliseconds, which it also sends, is a 504
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]

[checks.positive_data_acceptance]
expected-statuses = [200, 400, 404, 409, 413, 415, 504]
"""


def test_schemathesis_finds_nothing_to_object_to(careful_store: Path, tmp_path: Path) -> None:
    key = new_key("schemathesis", ["predict", "admin", "metrics"])
    (tmp_path / "keys.toml").write_text(key.toml)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.fuzz.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    with serving(careful_store, DERMLENS_API_KEYS=str(tmp_path / "keys.toml")) as (_, url):
        command = [
            *(sys.executable, "-m", "schemathesis.cli", f"--config-file={tmp_path / 'schemathesis.toml'}"),
            *("run", f"{url}/openapi.json", "--max-examples=4", "--seed=1", "--no-color", "--request-timeout=60"),
            f"--header=Authorization: Bearer {key.secret}",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Tested: 18" in done.stdout  # every operation
