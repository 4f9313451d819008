import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.model import store
from app.model.manifest import SCHEMA_VERSION, Manifest, NewerSchema, migrate
from app.model.store import VersionDamaged
from app.settings import Settings
from tests.conftest import JPEG, NAME, make_manifest


def publish_as(schema: object, root: Path, *, version: str) -> Path:
    """As the dermlens that wrote this schema published the version, its checksum too."""
    path = root / NAME / version / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": schema}, indent=2))
    path.with_name(store.CHECKSUM).write_bytes(store._checksum(path.read_bytes()))
    return path


def test_a_version_of_schema_1_verifies_and_serves_and_stays_as_it_is_on_disk(quick_store: Path, lesion: bytes) -> None:
    path = publish_as(1, quick_store, version="1")
    published = path.read_bytes()
    assert store.verify(quick_store, NAME, "1").schema_version == SCHEMA_VERSION
    store.promote(quick_store, NAME, "2")
    assert store.rollback(quick_store, NAME) == "1"
    with TestClient(create_app(Settings(model_store=quick_store))) as client:
        answer = client.post("/predict", content=lesion, headers=JPEG)
        assert (answer.status_code, answer.json()["model"]["version"]) == (200, "1")
        assert [model["problem"] for model in client.get("/models").json()["versions"]] == [None, None]
    assert path.read_bytes() == published


def test_a_newer_schema_is_refused_with_both_numbers_and_what_to_do(quick_store: Path) -> None:
    publish_as(99, quick_store, version="2")
    for use in (store.verify, store.load, store.promote):
        with pytest.raises(VersionDamaged, match=rf"schema 99 is newer than {SCHEMA_VERSION}, .* upgrade dermlens"):
            use(quick_store, NAME, "2")
    assert store.current(quick_store, NAME) == "1"


@pytest.mark.parametrize("schema", [0, -1, "1", True, None, 1.0])
def test_what_is_no_schema_is_not_guessed_at(quick_store: Path, schema: object) -> None:
    publish_as(schema, quick_store, version="1")
    with pytest.raises(VersionDamaged, match="schema_version"):
        store.verify(quick_store, NAME, "1")


def test_every_older_schema_has_its_steps_to_this_one_and_no_field_is_lost() -> None:
    now = make_manifest().model_dump(mode="json")
    for schema in range(1, SCHEMA_VERSION + 1):
        old = now | {"schema_version": schema}
        assert Manifest(**migrate(old)) == make_manifest()
        assert old["schema_version"] == schema  # what was given is left alone
    with pytest.raises(NewerSchema):
        migrate(now | {"schema_version": SCHEMA_VERSION + 1})


def test_what_is_published_is_of_this_schema(quick_store: Path) -> None:
    assert json.loads((quick_store / NAME / "1" / store.MANIFEST).read_text())["schema_version"] == SCHEMA_VERSION
