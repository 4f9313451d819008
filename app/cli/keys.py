"""dermlens keys"""

import argparse
import sys
from typing import Any, get_args

from app.cli.tell import tell
from app.security import Scope, new_key
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `keys` and its action."""
    keys = commands.add_parser("keys", help="make API keys").add_subparsers(required=True, metavar="ACTION")
    new = keys.add_parser("new", help="draw a key; it is shown once, its entry for the key file goes to stdout")
    new.add_argument("name", help="who will hold it; appears in logs")
    new.add_argument("--scope", action="append", dest="scopes", required=True, choices=get_args(Scope))
    new.add_argument("--per-minute", type=int, help="requests a minute at most")
    new.add_argument("--json", action="store_true", help="the key and its entry as one JSON object on stdout")
    new.set_defaults(run=_new_key)


def _new_key(options: argparse.Namespace, _: Settings) -> int:
    key = new_key(options.name, options.scopes, per_minute=options.per_minute)
    if not options.json:
        sys.stderr.write(f"{key.secret}\n")
    tell(options, key.toml, name=options.name, secret=key.secret, toml=key.toml)
    return 0
