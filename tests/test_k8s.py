"""The Kubernetes manifests, against Kubernetes' own schemas and against what the server and the image are.

No cluster was at hand; docs/kubernetes.md says what was checked and how.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from fastapi.testclient import TestClient

from app.metrics import Metrics
from app.settings import Settings, unknown_variables
from tests.conftest import ROOT

K8S = ROOT / "deploy" / "k8s"
SCHEMAS = ("1.29", "1.37")  # the oldest that should do, and the newest that there are schemas of
Resource = dict[str, Any]
needs_kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, whose kustomize builds them")


def read(path: Path) -> list[Resource]:
    return list(yaml.safe_load_all(path.read_text()))


BASE = [
    resource
    for name in read(K8S / "base" / "kustomization.yaml")[0]["resources"]
    for resource in read(K8S / "base" / name)
]
(INFERENCE_SERVICE,) = read(K8S / "kserve" / "inferenceservice.yaml")
(SERVICE_MONITOR,) = read(K8S / "components" / "monitor" / "servicemonitor.yaml")
each_overlay = pytest.mark.parametrize("overlay", ["cpu", "gpu"])
each_schema = pytest.mark.parametrize("version", SCHEMAS)


def find(kind: str, resources: list[Resource] = BASE, name: str = "dermlens") -> Resource:
    (found,) = [r for r in resources if r["kind"] == kind and r["metadata"]["name"] == name]
    return found


POD: Resource = find("Deployment")["spec"]["template"]["spec"]
PREDICTOR: Resource = INFERENCE_SERVICE["spec"]["predictor"]
KSERVE_FIELDS = {
    "minReplicas",
    "maxReplicas",
    "scaleMetric",
    "scaleTarget",
}  # beside those of a pod, as in its Python models
each_pod = pytest.mark.parametrize("pod", [POD, PREDICTOR], ids=["deployment", "kserve"])


def build(overlay: str) -> list[Resource]:
    done = subprocess.run(
        ["kubectl", "kustomize", K8S / "overlays" / overlay],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    return list(yaml.safe_load_all(done.stdout))


def validate(resource: Resource, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


@each_schema
@pytest.mark.parametrize("resource", BASE, ids=lambda r: f"{r['kind']}-{r['metadata']['name']}")
def test_a_resource_follows_its_schema(resource: Resource, version: str) -> None:
    validate(resource, version)


def test_a_misspelt_field_is_refused() -> None:
    wrong = find("PodDisruptionBudget")
    wrong = wrong | {"spec": wrong["spec"] | {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="maxUnavailabel"):
        validate(wrong, SCHEMAS[-1])


@needs_kustomize
@each_overlay
def test_kustomize_builds_an_overlay_that_follows_the_schemas(overlay: str) -> None:
    resources = build(overlay)
    assert {r["kind"] for r in resources} == {r["kind"] for r in BASE}
    for resource in resources:
        validate(resource, SCHEMAS[-1])
        assert resource["metadata"].get("namespace", "dermlens") == "dermlens"
    (container,) = find("Deployment", resources)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"dermlens:{overlay}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "gpu")
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["env"][-1]["name"] == "DERMLENS_CPU_THREADS"  # a patch adds variables, and takes none away


@needs_kustomize
@each_overlay
def test_an_overlay_lets_in_its_clients_and_prometheus_alone(overlay: str) -> None:
    """kustomize's labels, had they been put into selectors, would have made Prometheus' our own."""
    resources = build(overlay)
    closed, opened = find("NetworkPolicy", resources, "closed"), find("NetworkPolicy", resources)
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    clients, prometheus = opened["spec"]["ingress"]
    assert clients["from"] == [{"namespaceSelector": {"matchLabels": {"dermlens-client": "true"}}}]
    assert prometheus["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert "egress" not in opened["spec"]


def test_kserve_runs_a_pod_that_follows_the_schema() -> None:
    spec = {key: value for key, value in PREDICTOR.items() if key not in KSERVE_FIELDS}
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}, SCHEMAS[-1])
    assert PREDICTOR.keys() >= KSERVE_FIELDS
    assert (INFERENCE_SERVICE["apiVersion"], INFERENCE_SERVICE["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    (container,) = PREDICTOR["containers"]
    assert container["name"] == "kserve-container"
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]


def test_kserve_runs_the_pod_of_the_deployment() -> None:
    ours, theirs = POD["containers"][0], PREDICTOR["containers"][0]
    for field in ("securityContext", "lifecycle", "volumeMounts"):
        assert theirs[field] == ours[field]
    for field in ("securityContext", "volumes", "terminationGracePeriodSeconds", "enableServiceLinks"):
        assert PREDICTOR[field] == POD[field]


@each_pod
def test_a_pod_has_no_rights(pod: Resource) -> None:
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {pod['securityContext']['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


@each_pod
def test_a_probe_asks_a_route_that_the_server_answers(pod: Resource, client: TestClient) -> None:
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == Settings().port
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]["httpGet"]
        assert probe["port"] in (port["name"], port["containerPort"])
        assert client.get(probe["path"]).status_code == 200
    assert "live" in container["livenessProbe"]["httpGet"]["path"]  # a busy server is not restarted


@each_pod
def test_a_stop_waits_for_what_was_accepted(pod: Resource) -> None:
    word, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert pod["terminationGracePeriodSeconds"] * 1000 > int(seconds) * 1000 + Settings().timeout_ms + 5000


@each_pod
def test_variables_are_settings_and_files_are_mounted(pod: Resource) -> None:
    (container,) = pod["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert unknown_variables(values) == []
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(Path(values["DERMLENS_API_KEYS"]).parent) in folders
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@each_pod
def test_the_service_of_the_same_name_sets_no_port(pod: Resource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{find('Service')['metadata']['name'].upper()}_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ValueError, match="port"):
        Settings()
    assert pod["enableServiceLinks"] is False


def test_every_selector_finds_the_pods() -> None:
    labels = find("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert labels >= find("Service")["spec"]["selector"].items()
    for selector in (
        find("Deployment")["spec"]["selector"],
        find("PodDisruptionBudget")["spec"]["selector"],
        find("NetworkPolicy")["spec"]["podSelector"],
        POD["topologySpreadConstraints"][0]["labelSelector"],
    ):
        assert labels >= selector["matchLabels"].items()
    assert find("Service")["metadata"]["labels"].items() >= SERVICE_MONITOR["spec"]["selector"]["matchLabels"].items()
    assert find("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == find("Deployment")["metadata"]["name"]


def test_it_scales_on_a_metric_that_the_server_has_and_the_adapter_tells() -> None:
    (metric,) = find("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {family.name for family in Metrics().registry.collect()}
    (rule,) = read(K8S / "prometheus-adapter-values.yaml")[0]["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert "replicas" not in find("Deployment")["spec"]


def test_prometheus_scrapes_the_port_and_the_path_that_there_are(client: TestClient) -> None:
    (endpoint,) = SERVICE_MONITOR["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in find("Service")["spec"]["ports"]}
    assert client.get(endpoint["path"]).status_code == 200
