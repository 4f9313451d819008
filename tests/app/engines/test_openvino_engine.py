import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.engines.base import EngineUnavailable, build_engine
from app.engines.buckets import Slots
from app.engines.openvino_engine import OpenVinoEngine, choose_precision, computes_bfloat16
from app.model import store
from app.model.store import Int8Graph, LoadedVersion
from tests.conftest import NAME, ROOT

GRAPH = Int8Graph(b"<net/>", b"")


@pytest.fixture(scope="module")
def loaded(model_store: Path) -> LoadedVersion:
    return store.load(model_store, NAME, "1")


@pytest.fixture(scope="module")
def engine(loaded: LoadedVersion) -> OpenVinoEngine:
    return OpenVinoEngine(loaded, precision="float32")


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 224, 224), dtype=np.uint8)


def test_it_gives_what_torch_gives(loaded: LoadedVersion, engine: OpenVinoEngine) -> None:
    ours, theirs = engine.run(images(3)), build_engine("torch", loaded).run(images(3))
    assert np.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert np.allclose(ours.cam, theirs.cam, atol=1e-4 * np.abs(theirs.cam).max())
    assert ours.features is not None
    assert theirs.features is not None
    assert ours.features.shape == (3, 1024)
    assert np.allclose(ours.features, theirs.features, atol=1e-4 * np.abs(theirs.features).max())
    assert ours.logits.dtype == ours.cam.dtype == np.float32


def test_batch_neighbours_do_not_change_an_answer(engine: OpenVinoEngine) -> None:
    together = engine.run(images(5))
    for row, image in enumerate(images(5)):
        alone = engine.run(image[None])
        assert np.allclose(alone.logits[0], together.logits[row], atol=1e-5)
        assert np.allclose(alone.cam[0], together.cam[row], atol=1e-5 * np.abs(together.cam).max())


def test_an_answer_is_its_own_and_outlives_the_next_batch(engine: OpenVinoEngine) -> None:
    first = engine.run(images(2))
    kept = first.logits.copy()
    engine.run(255 - images(2))
    assert np.array_equal(first.logits, kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_batches_share_the_threads_that_there_are(loaded: LoadedVersion, threads: int) -> None:
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("one core")
    engine = OpenVinoEngine(loaded, precision="float32", threads=threads)
    assert engine.in_flight == threads
    with engine._requests.take() as request:
        compiled = request.get_compiled_model(), engine._alone.get_compiled_model()
    assert [model.get_property("INFERENCE_NUM_THREADS") for model in compiled] == [threads, threads]
    assert [model.get_property("NUM_STREAMS") for model in compiled] == [threads, 1]
    assert [model.get_property("ENABLE_CPU_PINNING") for model in compiled] == [False, False]  # others have cores too


def test_batches_beside_one_another_get_what_they_would_alone(loaded: LoadedVersion) -> None:
    engine = OpenVinoEngine(loaded, precision="float32", threads=2)
    batches = [images(4)[:size] for size in (1, 2, 3, 4)] * 3
    alone = [engine.run(batch).logits for batch in batches[:4]] * 3
    with ThreadPoolExecutor(3) as pool:  # one more than there is room for, which waits
        together = [output.logits for output in pool.map(engine.run, batches)]
    for ours, theirs in zip(together, alone, strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)


def test_a_batch_takes_all_threads_where_it_is_alone(loaded: LoadedVersion) -> None:
    engine = OpenVinoEngine(loaded, precision="float32", threads=2)
    taken: list[str] = []

    class Watched:
        def __init__(self, name: str, request: Any) -> None:
            self._name, self._request = name, request

        def infer(self, *args: Any, **options: Any) -> None:
            taken.append(self._name)
            self._request.infer(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._request, name)

    with engine._requests.take() as one, engine._requests.take() as other:
        watched = [Watched("shared", one), Watched("shared", other)]
    engine._requests, engine._alone = Slots(watched), Watched("alone", engine._alone)
    engine.run(images(1))
    with engine._requests.take():  # as another batch does
        engine.run(images(1))
    engine.run(images(2))
    assert taken == ["alone", "shared", "alone"]


def test_other_methods_are_torchs(loaded: LoadedVersion, engine: OpenVinoEngine) -> None:
    image = images(1)[0, :, :64, :64]
    expected = build_engine("torch", loaded).attribute(image, "integrated-gradients", target=1)
    assert np.allclose(engine.attribute(image, "integrated-gradients", target=1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "bfloat16", "graph", "chosen"),
    [
        ("auto", True, GRAPH, "bfloat16"),
        ("auto", False, GRAPH, "int8"),
        ("auto", False, None, "float32"),
        ("int8", True, GRAPH, "int8"),
        ("float32", True, GRAPH, "float32"),
    ],
)
def test_auto_takes_the_fastest_that_is_close_enough(
    loaded: LoadedVersion, wanted: str, bfloat16: bool, graph: Int8Graph | None, chosen: str
) -> None:
    version = LoadedVersion(loaded.manifest, {}, graph)
    assert choose_precision(wanted, version, bfloat16=bfloat16) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["int8", "bfloat16"])
def test_what_is_not_there_is_refused_and_says_what_to_do(loaded: LoadedVersion, wanted: str) -> None:
    with pytest.raises(EngineUnavailable, match=f"DERMLENS_PRECISION={wanted}.*use auto"):
        choose_precision(wanted, loaded, bfloat16=False)  # type: ignore[arg-type]


@pytest.mark.skipif(not computes_bfloat16(), reason="this processor does not compute in bfloat16")
def test_bfloat16_is_close_to_float32(loaded: LoadedVersion, engine: OpenVinoEngine) -> None:
    ours, theirs = OpenVinoEngine(loaded, precision="bfloat16").run(images(2)), engine.run(images(2))
    assert 0 < np.abs(ours.logits - theirs.logits).max() < 0.05 * max(1.0, float(np.abs(theirs.logits).max()))


def test_serving_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom app.main import create_app\nfrom app.settings import Settings\n"
        "create_app(Settings(max_batch=1, engine='openvino'))\nassert 'torch' not in sys.modules\nprint('served')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "served", done.stderr
