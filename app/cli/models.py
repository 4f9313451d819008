"""dermlens models"""

import argparse
import sys
from pathlib import Path
from typing import Any

from app.cli.tell import tell
from app.engines.base import warm_up
from app.main import list_models, open_loaded
from app.model import store
from app.settings import Settings


def add(commands: Any) -> None:
    """Add `models` and its actions."""
    models = commands.add_parser("models", help="the published versions")
    models.set_defaults(run=_models)
    actions = models.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("promote", _promote, "make a version the current one; a running server follows"),
        ("verify", _verify, "check every file of a version against its hash"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("version")
        action.set_defaults(run=run)
    publish = actions.add_parser("publish", help="put a version that was made elsewhere into the store, once it runs")
    publish.add_argument("folder", type=Path, metavar="FOLDER", help="the version's folder, as it was copied here")
    publish.add_argument("--promote", action="store_true", help="and make it the current one")
    publish.set_defaults(run=_publish)
    actions.add_parser("rollback", help="back to the version that was current before").set_defaults(run=_rollback)
    prune = actions.add_parser(
        "prune", help="delete old versions; the current, the previous and any that a setting names stay"
    )
    prune.add_argument("--keep", type=int, default=3, help="newest versions to keep (default 3)")
    prune.set_defaults(run=_prune)
    for parser in (models, *actions.choices.values()):
        # What an action does not name, it must not take back from `models --json ACTION`
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object a line")
    models.set_defaults(json=False)


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
    text = f"{settings.model_name} {options.version} is current"
    tell(options, text, name=settings.model_name, version=options.version)
    return 0


def _publish(options: argparse.Namespace, settings: Settings) -> int:
    root = settings.model_store
    sys.stderr.write(f"reading {options.folder} and checking every file against its hash\n")
    package = store.unpack(options.folder)
    manifest, megabytes = package.version.manifest, sum(map(len, package.files.values())) / 1e6
    title = f"{manifest.name} {manifest.version}"
    if manifest.name != settings.model_name:
        raise ValueError(
            f"{options.folder} is {title}, and no {settings.model_name}: set DERMLENS_MODEL_NAME={manifest.name} for it"
        )
    if manifest.version in store.versions(root, manifest.name):  # `adopt` refuses it too, after seconds of work
        raise store.VersionExists(f"{title} is in {root.resolve()} already, and published versions never change")
    sys.stderr.write(f"running {title} once: {len(manifest.files)} files are as they were published\n")
    warm_up(open_loaded(settings, package.version).engine, size=manifest.preprocessing.size, max_batch=1)
    sys.stderr.write(f"writing {megabytes:.1f} MB\n")
    folder = store.adopt(root, package)
    if options.promote:
        store.promote(root, manifest.name, manifest.version)
    text = f"published {folder}, {'and is current' if options.promote else 'but is not current: see models promote'}"
    tell(options, text, name=manifest.name, version=manifest.version, folder=str(folder), current=options.promote)
    return 0


def _rollback(options: argparse.Namespace, settings: Settings) -> int:
    version = store.rollback(settings.model_store, settings.model_name)
    tell(options, f"{settings.model_name} {version} is current again", name=settings.model_name, version=version)
    return 0


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    manifest = store.verify(settings.model_store, settings.model_name, options.version)
    text = f"{manifest.name} {manifest.version}: {len(manifest.files)} files are as they were published"
    tell(options, text, name=manifest.name, version=manifest.version, files=len(manifest.files))
    return 0


def _prune(options: argparse.Namespace, settings: Settings) -> int:
    named = {settings.model_version, settings.shadow_version or ""}  # a server may run on either, whatever is current
    removed = store.prune(settings.model_store, settings.model_name, keep=options.keep, also=named)
    tell(options, f"removed: {', '.join(removed) or 'nothing'}", name=settings.model_name, removed=removed)
    return 0
