"""The threads that decode, when clients do not wait for them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.clinical.dicom import decode
from app.main import create_app
from app.model.preprocess import DecodedImage
from app.settings import Settings
from tests.app.test_served import until
from tests.conftest import JPEG

HASTE = JPEG | {"X-Timeout-Ms": "50"}


@pytest.mark.usefixtures("quick_store")
def test_no_more_images_are_decoded_at_once_however_soon_clients_give_up(
    tmp_path: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = list[int](), threading.Event()

    def slowly(data: bytes, **options: Any) -> DecodedImage:
        begun.append(len(data))
        goes_on.wait(30)
        return decode(data, **options)

    monkeypatch.setattr("app.main.decode", slowly)
    settings = Settings(model_store=tmp_path, decode_threads=2)
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(5) as pool:
        try:
            answers = list(pool.map(lambda _: client.post("/predict", content=lesion, headers=HASTE), range(5)))
            assert [answer.status_code for answer in answers] == [504] * 5
            assert len(begun) == 2  # which nothing can stop; nobody waits for the other three any more
        finally:
            goes_on.set()
        assert client.post("/predict", content=lesion, headers=JPEG).status_code == 200
        until(lambda: len(begun) == 3, "the last one")
