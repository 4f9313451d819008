"""What a replica makes of its settings and its health; Ray itself is run by `benchmarks/ray_cluster.py` alone."""

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError
from ray_serve import (
    NotReady,
    RaySettings,
    check_ready,
    first_free,
    in_replica,
    longest_request_s,
    options,
    with_whole_paths,
)

from app.main import create_app
from app.settings import Settings
from tests.conftest import ROOT


def test_a_replica_has_a_gpu_where_the_cluster_has_any() -> None:
    for gpu in (False, True):
        wanted = options(Settings(), RaySettings(cpus=3), gpu=gpu)["ray_actor_options"]
        assert wanted == {"num_cpus": 3, "num_gpus": int(gpu)}


def test_the_app_refuses_before_ray_does() -> None:
    settings = Settings(max_queue=40)
    assert options(settings, RaySettings(), gpu=False)["max_ongoing_requests"] > settings.max_queue


def test_a_replica_that_leaves_has_time_for_its_slowest_request() -> None:
    settings = Settings(timeout_ms=90_000, read_timeout_ms=20_000)
    assert longest_request_s(settings) == 110
    assert options(settings, RaySettings(), gpu=False)["graceful_shutdown_timeout_s"] > 110


def test_the_environment_sets_how_many_replicas_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MIN_REPLICAS", "2"), ("MAX_REPLICAS", "5"), ("TARGET_ONGOING_REQUESTS", "64")):
        monkeypatch.setenv(f"DERMLENS_RAY_{name}", value)
    wanted = options(Settings(), RaySettings(), gpu=True)["autoscaling_config"]
    assert wanted == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 64}


def test_no_replica_at_all_is_no_setting() -> None:
    with pytest.raises(ValidationError):
        RaySettings(min_replicas=0)


def test_a_replica_takes_no_more_threads_than_its_cores_unless_told() -> None:
    assert in_replica(Settings(), RaySettings(cpus=2.5), "a").cpu_threads == 3
    assert in_replica(Settings(cpu_threads=4), RaySettings(cpus=2), "a").cpu_threads == 4


def test_paths_are_those_of_where_the_script_runs() -> None:
    settings = with_whole_paths(Settings(model_store=Path("a"), api_keys=Path("b/keys.toml"), audit_log=None))
    assert (settings.model_store, settings.api_keys) == (Path.cwd() / "a", Path.cwd() / "b" / "keys.toml")
    assert settings.audit_log is None


def test_each_replica_writes_an_audit_log_of_its_own() -> None:
    settings = Settings(audit_log=Path("/var/log/audit.jsonl"))
    assert in_replica(settings, RaySettings(), "x7").audit_log == Path("/var/log/audit-x7.jsonl")
    assert in_replica(Settings(), RaySettings(), "x7").audit_log is None


def test_the_replicas_of_a_node_answer_on_different_ports() -> None:
    with first_free("127.0.0.1", 19_400) as one, first_free("127.0.0.1", 19_400) as other:
        ports = [listening.getsockname()[1] for listening in (one, other)]
    assert 19_400 <= ports[0] < ports[1]


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="assign"):
        first_free("192.0.2.1", 19_400)


@pytest.mark.usefixtures("quick_store")
def test_a_replica_is_healthy_while_its_app_is_ready(tmp_path: Path) -> None:
    app = create_app(Settings(model_store=tmp_path))

    async def live() -> None:
        with pytest.raises(NotReady, match="starting or stopping"):
            await check_ready(app)
        async with app.router.lifespan_context(app):
            await check_ready(app)
        with pytest.raises(NotReady, match="starting or stopping"):
            await check_ready(app)

    asyncio.run(live())


@pytest.mark.usefixtures("quick_store")
def test_a_replica_whose_device_is_stuck_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.batcher import MicroBatcher

    monkeypatch.setattr(MicroBatcher, "oldest_run_s", 1.0)
    ended: list[str] = []
    app = create_app(Settings(model_store=tmp_path, stuck_ms=200), on_failure=ended.append)

    async def live() -> None:
        async with app.router.lifespan_context(app):
            while not ended:
                await asyncio.sleep(0.02)
            with pytest.raises(NotReady, match="forward pass"):
                await check_ready(app)

    asyncio.run(live())


@pytest.mark.parametrize("name", RaySettings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    field = RaySettings.model_fields[name]
    line = f"| `DERMLENS_RAY_{name.upper()}` | `{field.default}` | {field.description} |"
    assert line in (ROOT / "docs" / "ray.md").read_text()
