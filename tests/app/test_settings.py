"""Settings that follow from others."""

import os

import pytest

from app.settings import Settings


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (2, 2), (8, 8), (64, 16)])
def test_as_many_images_are_decoded_at_once_as_there_are_cores(cores: int, workers: int) -> None:
    assert Settings(cpu_threads=cores).workers == workers


def test_without_a_limit_every_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)

    assert Settings().cores == Settings().workers == 12


def test_who_says_how_many_gets_so_many() -> None:
    assert Settings(cpu_threads=8, decode_threads=3).workers == 3
