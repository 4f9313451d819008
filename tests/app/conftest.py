"""The app over a store with random weights, and a client that speaks HTTP to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="session")
def client(model_store: Path) -> Iterator[TestClient]:
    settings = Settings(
        model_store=model_store, engine="torch", max_batch=4, max_upload_bytes=2_000_000, max_batch_files=4
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client
