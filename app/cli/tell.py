"""What a command tells at its end."""

import argparse
import json
from typing import Any


def tell(options: argparse.Namespace, text: str, **fields: Any) -> None:
    """The text for people, or with `--json` the fields."""
    print(json.dumps(fields) if options.json else text)
