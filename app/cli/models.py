"""dermlens models"""

import argparse
import sys
from typing import Any

from app.main import list_models
from app.model import store
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `models` and its actions."""
    models = commands.add_parser("models", help="the published versions")
    models.add_argument("--json", action="store_true", help="the manifests as JSON")
    models.set_defaults(run=_models)
    actions = models.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("promote", _promote, "make a version the current one; a running server follows"),
        ("verify", _verify, "check every file of a version against its hash"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("version")
        action.set_defaults(run=run)
    actions.add_parser("rollback", help="back to the version that was current before").set_defaults(run=_rollback)
    prune = actions.add_parser("prune", help="delete old versions; the current and the previous one stay")
    prune.add_argument("--keep", type=int, default=3, help="newest versions to keep (default 3)")
    prune.set_defaults(run=_prune)


def _models(options: argparse.Namespace, settings: Settings) -> int:
    try:
        served = store.current(settings.model_store, settings.model_name)
    except store.StoreError as error:
        served = None
        sys.stderr.write(f"{error}\n")
    for model in list_models(settings.model_store, settings.model_name, served):
        if options.json:
            print(model.model_dump_json())
            continue
        line = f"{'*' if model.served else ' '} {settings.model_name} {model.version}"
        metrics = (model.manifest or {}).get("metrics", {})
        figures = "  ".join(f"{k} {m['value']:.3f} ({m['low']:.3f}–{m['high']:.3f})" for k, m in metrics.items())
        print(f"{line}  {model.problem or figures}")
    return 0


def _promote(options: argparse.Namespace, settings: Settings) -> int:
    store.promote(settings.model_store, settings.model_name, options.version)
    print(f"{settings.model_name} {options.version} is current")
    return 0


def _rollback(_: argparse.Namespace, settings: Settings) -> int:
    version = store.rollback(settings.model_store, settings.model_name)
    print(f"{settings.model_name} {version} is current again")
    return 0


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    manifest = store.verify(settings.model_store, settings.model_name, options.version)
    print(f"{manifest.name} {manifest.version}: {len(manifest.files)} files are as they were published")
    return 0


def _prune(options: argparse.Namespace, settings: Settings) -> int:
    removed = store.prune(settings.model_store, settings.model_name, keep=options.keep)
    print(f"removed: {', '.join(removed) or 'nothing'}")
    return 0
