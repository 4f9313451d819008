"""The answers in README.md and docs, from a server of the bundled version that this starts: python -m tests.answers

In a fenced block that begins with `$ `, each such line is run, and what follows it becomes its output.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import NAME, ROOT

WIDTH = 118
SHOWN = re.compile(r"(?<=^```\n)\$ .*?(?=^```$)", re.MULTILINE | re.DOTALL)
CUT = re.compile(r"\| cut -c1-(\d+)$")
LINK = re.compile(rf"(?<=\]\()((?:\.\./)*model_store/{NAME}/)\d+(?=/)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def served() -> str:
    """The bundled version."""
    return (ROOT / "model_store" / NAME / "current").read_text().strip()


def renewed(text: str, *, port: int, folder: Path) -> str:
    """The page with its commands run in `folder`, where :8000 means `port`, and its links at the bundled version."""
    text = LINK.sub(rf"\g<1>{served()}", text)
    return SHOWN.sub(lambda block: "".join(_answers(block[0], port, folder)), text)


def _answers(block: str, port: int, folder: Path) -> Iterator[str]:
    for command in re.findall(r"^\$ .*$", block, re.MULTILINE):
        script = "set -o pipefail; " + command[2:].replace("localhost:8000", f"localhost:{port}")
        done = subprocess.run(
            ["bash", "-c", script],  # noqa: S607 - bash from the path
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr[-500:]}")
        cut = CUT.search(command)
        more = " …" if cut and len(done.stdout.rstrip("\n")) == int(cut[1]) else ""
        yield f"{command}\n{wrapped(done.stdout.rstrip() + more)}\n"


def wrapped(output: str) -> str:
    """JSON with a space after each comma and colon, in lines that end at a space; any other line is cut at `WIDTH`."""
    try:
        whole = json.dumps(json.loads(output), ensure_ascii=False)
    except ValueError:
        lines = output.replace("\r", "").splitlines()
        return "\n".join(line[at : at + WIDTH] for line in lines for at in range(0, max(1, len(line)), WIDTH))
    return textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False)


def environment(**more: str) -> dict[str, str]:
    """The commands and packages of this checkout and environment, and no settings but `more`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DERMLENS_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def bundled_server() -> Iterator[int]:
    """`dermlens serve` with its defaults, ready, by its port."""
    port = free_port()
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=environment(DERMLENS_LOG_LEVEL="warning"))
    try:
        ready = ["curl", "-sf", "--retry", "120", "--retry-delay", "1", "--retry-connrefused"]
        subprocess.run([*ready, f"http://localhost:{port}/readyz"], check=True, capture_output=True)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    changed = 0
    with bundled_server() as port, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in ROOT.iterdir():
            (folder / entry.name).symlink_to(entry)  # what a command writes stays here
        for page in pages():
            before = page.read_text()
            after = renewed(before, port=port, folder=folder)
            page.write_text(after)
            changed += after != before
            if blocks := len(SHOWN.findall(after)):
                print(f"{page.relative_to(ROOT)}: blocks of answers: {blocks}")
    print(f"summary: pages changed: {changed}, answers of version {served()}")


if __name__ == "__main__":
    main()
