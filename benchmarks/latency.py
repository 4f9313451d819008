"""Latency of one request at a time against a running server.

make serve                                            # in another shell
.venv/bin/python benchmarks/latency.py FILE... --count 30
"""

import argparse
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def request_ms(url: str, data: bytes) -> float:
    """Milliseconds of one POST of an image, body read."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/octet-stream"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of one request at a time against a running server.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=30)
    options = parser.parse_args()
    print(f"{'file':24} {'route':9} {'median ms':>9} {'p95 ms':>7}   {options.count} requests, routes alternating")
    for path in options.files:
        data = path.read_bytes()
        times: dict[str, list[float]] = {"/predict": [], "/explain": []}
        try:
            for number in range(options.count + 3):
                for route, seen in times.items():
                    elapsed = request_ms(options.url + route, data)
                    if number >= 3:  # the first rounds warm the server up for this image size
                        seen.append(elapsed)
        except urllib.error.URLError as error:
            sys.exit(f"latency: no answer from {options.url} for {path.name}: {error}; is `make serve` running?")
        for route, seen in times.items():
            p95 = statistics.quantiles(seen, n=20)[-1]
            print(f"{path.name:24} {route:9} {statistics.median(seen):9.1f} {p95:7.1f}")


if __name__ == "__main__":
    main()
