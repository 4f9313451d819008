"""The `dermlens` command: a module for each group of subcommands."""

import argparse
import sys

from pydantic import ValidationError

from app.audit import AuditBroken, AuditFailed, AuditLocked
from app.cli import audit, clinical, export, images, keys, models, serve
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
)


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 some file failed, 2 nothing could be done."""
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
    sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Every command; each sets `run`, which takes the options and the settings and gives the exit code."""
    parser = argparse.ArgumentParser(prog="dermlens", description="Skin-lesion inference. " + NOTICE)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (serve, images, clinical, models, export, keys, audit):
        group.add(commands)
    return parser
