"""The `dermlens` command: a module for each group of subcommands."""

import argparse
import sys

from pydantic import ValidationError

from app.audit import AuditBroken, AuditFailed, AuditLocked
from app.cli import audit, clinical, completion, doctor, explain, export, keys, models, predict, serve
from app.engines.base import EngineUnavailable
from app.model import store
from app.model.labels import NOTICE
from app.settings import Settings, variable

REFUSALS = (
    store.StoreError,
    EngineUnavailable,
    AuditLocked,
    AuditBroken,
    AuditFailed,
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
)
INTERRUPTED = 130  # as a shell says of a command that SIGINT ended


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 some file failed or a check did not pass, 2 could not start or go on, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        overridable = ("host", "port", "operating_point", "coverage")
        given = {key: value for key in overridable if (value := getattr(options, key, None)) is not None}
        sys.exit(options.run(options, Settings().model_copy(update=given)))
    except ValidationError as error:
        for mistake in error.errors():
            name = str(mistake["loc"][0])
            default = Settings.model_fields[name].default
            sys.stderr.write(f"dermlens: {variable(name)}: {mistake['msg']}: correct it, or unset it for {default!r}\n")
    except REFUSALS as error:
        sys.stderr.write(f"dermlens: {error}\n")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Every command; each sets `run`, which takes the options and the settings and gives the exit code."""
    parser = argparse.ArgumentParser(prog="dermlens", description="Skin-lesion inference. " + NOTICE)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (serve, predict, explain, clinical, models, export, keys, audit, doctor, completion):
        group.add(commands)
    return parser
