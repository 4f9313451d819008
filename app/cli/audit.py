"""dermlens audit"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from app.audit import AuditBroken, Secret, Summary, find, verify
from app.cli.tell import tell
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `audit` and its actions."""
    audit = commands.add_parser("audit", help="check the audit log, or list an image's records")
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("verify", help="exit code 1 where the log is not as it was written")
    check.add_argument("log", type=Path, metavar="PATH")
    check.add_argument("--json", action="store_true", help="what was found as one JSON object")
    check.set_defaults(run=_audit_verify)
    look = actions.add_parser("find", help="the records of an image file, one JSON object a line")
    look.add_argument("image", type=Path, metavar="IMAGE")
    look.add_argument("--log", type=Path, required=True, metavar="PATH")
    look.set_defaults(run=_audit_find)
    for action in (check, look):
        action.add_argument("--key-file", type=Path, required=True, help="what DERMLENS_AUDIT_KEY_FILE names")


def _audit_verify(options: argparse.Namespace, _: Settings) -> int:
    options.log.stat()  # a wrong path is no sound log
    try:
        summary = verify(options.log, Secret(options.key_file.read_bytes()))
    except AuditBroken as error:
        sys.stderr.write(f"dermlens: {error}\n")
        if options.json:
            unknown = dict.fromkeys(field.name for field in fields(Summary))  # the same fields whatever was found
            tell(options, "", log=str(options.log), sound=False, problem=str(error), **unknown)
        return 1
    text = (
        f"{options.log}: {summary.records} records in {summary.files} files, {summary.first} to {summary.last}: sound"
    )
    tell(options, text, log=str(options.log), sound=True, problem=None, **asdict(summary))
    return 0


def _audit_find(options: argparse.Namespace, _: Settings) -> int:
    options.log.stat()
    for record in find(options.log, Secret(options.key_file.read_bytes()), options.image.read_bytes()):
        print(json.dumps(record))
    return 0
