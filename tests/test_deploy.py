"""The image, the compose file, the alerts and the dashboard, as far as they can be judged without a container engine.

What needs one was done by hand: docs/deployment.md says what, and with what result.
"""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from app.errors import KINDS
from app.metrics import Metrics
from app.settings import Settings
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROMETHEUS = DEPLOY / "prometheus"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "dermlens.json").read_text())
SUFFIXES = {
    "counter": ("_total", "_created"),
    "histogram": ("_bucket", "_sum", "_count", "_created"),
    "info": ("_info",),
    "gauge": ("",),
}
QUERIES = {
    **{rule.get("alert") or rule["record"]: rule["expr"] for rule in RULES},
    **{f"{p['title']} {t['refId']}": t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]},
}
each_query = pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
each_service = pytest.mark.parametrize("name", SERVICES)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)")


def exposed() -> set[str]:
    """Every series name that the server can expose, and every ratio that a rule records."""
    families = Metrics().registry.collect()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    return recorded | {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


@each_query
def test_a_query_asks_for_metrics_that_the_server_has(query: str) -> None:
    asked = set(re.findall(r"\b(?:dermlens[_:]|process_)[a-z0-9_:]*", query))
    assert asked or "up{" in query
    assert asked <= exposed()


@pytest.mark.parametrize(
    ("metric", "edge"),
    {found for query in QUERIES.values() for found in re.findall(r'(dermlens_\w+)_bucket\{[^}]*le="([^"]+)"', query)},
)
def test_an_objective_is_the_edge_of_a_bucket(metric: str, edge: str) -> None:
    metrics = Metrics()
    metrics.request_seconds.labels(route="/predict")
    (family,) = [family for family in metrics.registry.collect() if family.name == metric]
    assert edge in {sample.labels.get("le") for sample in family.samples}


@each_query
def test_a_query_asks_for_refusals_that_the_server_makes(query: str) -> None:
    reasons = set(re.findall(r'reason="([^"]*)"', query))
    assert reasons <= {kind.slug for kind in KINDS.values()}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"].keys() == {"summary", "action"}


def test_every_alert_has_a_test() -> None:
    files = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in ("alerts_test.yml", "drift_test.yml")]
    cases = [case for file in files for test in file["tests"] for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    quiet = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert fired == quiet == {rule["alert"] for rule in RULES if "alert" in rule}


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("test", "rules", "alerts_test.yml"),
        ("test", "rules", "drift_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
    ],
    ids="-".join,
)
def test_prometheus_accepts_it(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)  # noqa: S607
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_asks_the_name_that_either_server_has() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["api:8000"]}]
    for name in ("api", "api-cpu"):
        assert "api" in SERVICES[name]["networks"]["closed"]["aliases"]


def test_the_dashboard_reads_the_provisioned_data_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}


@each_service
def test_a_service_has_no_rights_and_no_more_than_its_share(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"cap_add", "privileged", "network_mode", "pid", "ipc", "user"}
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert service["restart"] == "unless-stopped"


@each_service
def test_a_service_is_reached_from_this_host_alone_unless_told_otherwise(name: str) -> None:
    (port,) = SERVICES[name]["ports"]
    assert re.match(r"(\$\{DERMLENS_PUBLISH:-)?127\.0\.0\.1:", port)


@each_service
def test_an_image_has_its_version(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
    else:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_only_the_gpu_server_asks_for_a_gpu_and_it_starts_by_default() -> None:
    assert {name for name, s in SERVICES.items() if "reservations" in s["deploy"]["resources"]} == {"api"}
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"api-cpu"}


def test_a_stop_waits_for_what_was_accepted() -> None:
    for name in ("api", "api-cpu"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) * 1000 > Settings().timeout_ms + 5000


def test_compose_sets_only_settings_that_there_are() -> None:
    known = {f"DERMLENS_{name.upper()}" for name in Settings.model_fields}
    set_here = {name for service in SERVICES.values() for name in service.get("environment", {})}
    in_image = set(re.findall(r"\b(DERMLENS_\w+)=", DOCKERFILE))
    assert {name for name in set_here | in_image if name.startswith("DERMLENS_")} <= known


def test_every_stage_starts_from_the_one_pinned_base() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = {name for _, name in stages}
    assert {"cpu", "gpu"} <= names
    assert {base for base, _ in stages} - names == {"${BASE_IMAGE}"}
    assert re.search(r"^ARG BASE_IMAGE=\S+:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert "latest" not in DOCKERFILE


def test_the_image_runs_as_nobody_in_particular_and_tells_its_health() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["10001:10001"]
    assert "HEALTHCHECK" in DOCKERFILE
    assert "/readyz" in DOCKERFILE


def test_no_final_stage_installs_anything() -> None:
    final = DOCKERFILE[DOCKERFILE.index(" AS runtime") :]
    assert not re.search(r"^(RUN|ADD) ", final, re.MULTILINE)


def test_the_build_sees_only_what_it_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY ((?!--)[^\n]+) \S+$", DOCKERFILE, re.MULTILINE)
    assert seen == {name for names in copied for name in names.split()}


def test_the_backend_of_the_build_is_one_that_the_project_asks_for() -> None:
    (asked,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found = re.search(r"'setuptools==(\d+)\.\S+ --hash=sha256:[0-9a-f]{64}'", DOCKERFILE)
    assert found
    assert int(found[1]) >= int(asked.removeprefix("setuptools>="))


def test_the_deployment_page_names_files_that_there_are() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert Path(ROOT / "docs" / target).exists(), target
