"""The manifests in deploy/: against the schemas, against each other, and against what the package and the images hold."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelstore.cluster.control.nodes import HOSTS_FIRST
from modelstore.cluster.control.supervisor import RESOURCE
from tests.deploy.checking import ROOT, documents, parse_command, pod_specs, problems, size, walk

DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*.yaml") if path.name != "kustomization.yaml")
OBJECTS = [document for path in FILES for document in documents(path)]
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
Document = dict[str, Any]


def named(kind: str, name: str = "") -> Document:
    """One object of the manifests."""
    (found,) = [o for o in OBJECTS if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


CLUSTER = named("RayCluster")
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
JOBS = [o for o in OBJECTS if o["kind"] == "RayJob"]


def pod(group: Document) -> Document:
    spec: Document = group["template"]["spec"]
    return spec


# ---------------------------------------------------------------------- schemas


@pytest.mark.parametrize("document", OBJECTS, ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_manifest_follows_its_schema(document: Document) -> None:
    assert problems(document) == []


def _head_misspelt(o: Document) -> None:
    o["spec"]["headGroupSpec"]["rayStartParam"] = {}


def _number_for_text(o: Document) -> None:
    o["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _unknown_in_container(o: Document) -> None:
    o["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["livenessProbes"] = {}


def _unknown_backend(o: Document) -> None:
    o["spec"]["authOptions"]["mode"] = "password"


def _no_head(o: Document) -> None:
    del o["spec"]["headGroupSpec"]


def _unknown_at_top(o: Document) -> None:
    o["specs"] = {}


def _unknown_in_metadata(o: Document) -> None:
    o["metadata"]["label"] = {}


def _wrong_version(o: Document) -> None:
    o["apiVersion"] = "ray.io/v2"


@pytest.mark.parametrize(
    "break_it",
    [
        _head_misspelt,
        _number_for_text,
        _unknown_in_container,
        _unknown_backend,
        _no_head,
        _unknown_at_top,
        _unknown_in_metadata,
        _wrong_version,
    ],
)
def test_broken_cluster_is_found(break_it: Callable[[Document], None]) -> None:
    broken = copy.deepcopy(CLUSTER)
    break_it(broken)
    assert problems(broken)


@pytest.mark.parametrize("document", OBJECTS, ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_unknown_fields_and_wrong_types_are_found_in_every_kind(document: Document) -> None:
    unknown = {**document, "extra": 1}
    wrong = {**document, "metadata": []}
    assert problems(unknown)
    assert problems(wrong)


@pytest.mark.parametrize(
    ("kind", "name", "way"),
    [
        ("RayJob", "modelstore-hosts", ("spec", "submitterPodTemplate", "spec", "containers", 0, "imag")),
        ("StatefulSet", "modelstore-redis", ("spec", "template", "spec", "securityContext", "runAsRoot")),
        ("NetworkPolicy", "modelstore-ray", ("spec", "ingress", 0, "form")),
        ("PodDisruptionBudget", "modelstore-storage", ("spec", "minAvailabel")),
    ],
)
def test_misspelt_field_deep_within_is_found(kind: str, name: str, way: tuple[str | int, ...]) -> None:
    broken = copy.deepcopy(named(kind, name))
    node: Any = broken
    for step in way[:-1]:
        node = node[step]
    node[way[-1]] = "x"
    assert problems(broken)


# ---------------------------------------------------------------------- what KubeRay refuses beyond its schema


def test_cluster_meets_what_kuberay_asks_beyond_the_schema() -> None:
    spec = CLUSTER["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        params = group["rayStartParams"]
        assert not (group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys())
        assert "labels" not in params
        assert pod(group).get("restartPolicy", "Never") == "Never"  # the autoscaler's second version wants it so
    head = pod(spec["headGroupSpec"])["containers"][0]
    assert "startupProbe" not in head  # it would stay in the job that empties Redis, which is made from this container
    names = {entry["name"] for entry in head["env"]}
    assert not names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2"}
    assert "storage" not in spec["gcsFaultToleranceOptions"]
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("job", JOBS, ids=lambda o: o["metadata"]["name"])
def test_job_runs_on_the_cluster_that_there_is(job: Document) -> None:
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert not job["spec"].get("backoffLimit")  # refused where a cluster is selected
    assert job["spec"]["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    resources = json.loads(job["spec"].get("entrypointResources", "{}"))
    assert resources.keys() <= {RESOURCE}


# ---------------------------------------------------------------------- the package and the images


@pytest.mark.parametrize("job", JOBS, ids=lambda o: o["metadata"]["name"])
def test_entrypoints_are_commands_that_exist(job: Document) -> None:
    options = parse_command(job["spec"]["entrypoint"])
    assert "auto" in (options.get("address"), options.get("cluster"))


def test_versions_are_the_images() -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "docker/requirements.txt").read_text(), re.M)
    assert locked
    assert CLUSTER["spec"]["rayVersion"] == locked[1]
    built = {entry["name"] for entry in documents(DEPLOY / "kustomization.yaml")[0]["images"]}
    used = {c["image"] for _, spec in pod_specs([CLUSTER, *JOBS]) for c in spec["containers"]}
    assert used == built == {f"modelstore-{path.name.split('.')[0]}" for path in (ROOT / "docker").glob("*.Dockerfile")}


def test_nodes_are_started_as_the_package_starts_its_own() -> None:
    for group in [CLUSTER["spec"]["headGroupSpec"], *GROUPS.values()]:
        env = {entry["name"]: entry.get("value") for entry in pod(group)["containers"][0]["env"]}
        assert HOSTS_FIRST.items() <= env.items()
    assert [name for name, group in GROUPS.items() if RESOURCE in group.get("resources", {})] == ["storage"]


def test_what_hosts_hold_fits_the_pod() -> None:
    options = parse_command(named("RayJob", "modelstore-hosts")["spec"]["entrypoint"])
    storage = GROUPS["storage"]
    volumes = {volume["name"]: volume for volume in pod(storage)["volumes"]}
    shared = size(volumes["shm"]["emptyDir"]["sizeLimit"])
    claim = volumes["cache"]["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]
    # Chunks, decoded models, saves that are not stored yet, and Ray's own objects.
    held = options["memory"] + options["images"] + options["pending"]
    assert held + int(storage["rayStartParams"]["object-store-memory"]) <= shared
    assert options["disk_size"] <= size(claim)
    assert options["hosts"] <= storage["minReplicas"] == storage["maxReplicas"]
    assert options["replicas"] <= storage["minReplicas"]
    mounts = {m["mountPath"]: m["name"] for m in pod(storage)["containers"][0]["volumeMounts"]}
    assert mounts[options["disk"]] == "cache"


def test_shared_memory_is_memory_within_the_limit() -> None:
    for group in [CLUSTER["spec"]["headGroupSpec"], *GROUPS.values()]:
        spec = pod(group)
        (shm,) = [v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm"]
        container = spec["containers"][0]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert shm["medium"] == "Memory"
        assert size(shm["sizeLimit"]) < size(container["resources"]["limits"]["memory"])
        assert int(group["rayStartParams"]["object-store-memory"]) < size(shm["sizeLimit"])


def test_only_the_gpu_group_asks_for_gpus() -> None:
    asking = [n for n, g in GROUPS.items() if "nvidia.com/gpu" in pod(g)["containers"][0]["resources"]["limits"]]
    cuda = [n for n, g in GROUPS.items() if pod(g)["containers"][0]["image"] == "modelstore-cuda"]
    assert asking == cuda == ["gpu"]


# ---------------------------------------------------------------------- security


@pytest.mark.parametrize(("where", "spec"), list(pod_specs(OBJECTS)), ids=lambda x: x if isinstance(x, str) else "")
def test_pods_are_restricted(where: str, spec: Document) -> None:
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
    for container in spec["containers"] + spec.get("initContainers", []):
        own = container["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"]
        assert container["resources"]["limits"]["memory"]
        assert {m["name"] for m in container["volumeMounts"]} <= _volumes(spec)
    probed = "RayJob" not in where
    assert all(("livenessProbe" in c and "readinessProbe" in c) == probed for c in spec["containers"])
    head = "headGroupSpec" in where
    assert spec["automountServiceAccountToken"] is head  # for the autoscaler; nobody else speaks to Kubernetes


def _volumes(spec: Document) -> set[str]:
    claims = [c["metadata"]["name"] for c in named("StatefulSet")["spec"]["volumeClaimTemplates"]]
    return {volume["name"] for volume in spec.get("volumes", [])} | set(claims)


def test_no_secret_lies_in_the_manifests() -> None:
    assert not [o for o in OBJECTS if o["kind"] == "Secret"]
    for document in OBJECTS:
        for path, node in walk(document):
            if isinstance(node, dict) and re.search(r"TOKEN|PASSWORD|SECRET|KEY|AUTH", str(node.get("name", ""))):
                assert "value" not in node, path
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token", "secretName": "modelstore-token"}


def test_what_is_referred_to_exists() -> None:
    accounts = {o["metadata"]["name"] for o in OBJECTS if o["kind"] == "ServiceAccount"}
    for where, spec in pod_specs([CLUSTER, *JOBS]):
        assert spec["serviceAccountName"] in accounts, where
    made = {entry["name"] for entry in documents(DEPLOY / "kustomization.yaml")[0]["configMapGenerator"]}
    known = {"configMapRef": made, "secretRef": {"modelstore-storage"}, "secretKeyRef": {"modelstore-redis"}}
    page = (ROOT / "docs/deploy.md").read_text()
    for document in OBJECTS:
        for path, node in walk(document):
            if path and path[-1] in known:
                assert node["name"] in known[path[-1]], path
    for secret in ("modelstore-token", "modelstore-redis", "modelstore-storage"):
        assert f"create secret generic {secret}" in page
    service = named("Service")
    assert CLUSTER["spec"]["gcsFaultToleranceOptions"]["redisAddress"] == (
        f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )


def test_selectors_select_what_there_is() -> None:
    groups = {"storage", "compress", "gpu", "headgroup"}
    redis = named("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    foreign = {"kuberay-operator", "prometheus"}
    for document in OBJECTS:
        for path, labels in walk(document):
            if not path or path[-1] not in ("matchLabels", "selector") or not isinstance(labels, dict):
                continue
            if "matchLabels" in labels:
                continue
            assert labels.get("ray.io/cluster", "modelstore") == CLUSTER["metadata"]["name"]
            assert labels.get("ray.io/group", "storage") in groups
            assert labels.get("app.kubernetes.io/name") in {None, *redis.values(), *foreign}
            assert labels.get("ray.io/originated-from-crd", "RayJob") == "RayJob"
    assert GROUPS.keys() == {"storage", "compress", "gpu"}
    policies = [o for o in OBJECTS if o["kind"] == "NetworkPolicy"]
    assert all(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies)


# ---------------------------------------------------------------------- kustomize


@pytest.mark.parametrize("folder", [DEPLOY, DEPLOY / "jobs"], ids=lambda p: p.name)
def test_kustomization_names_every_file(folder: Path) -> None:
    (kustomization,) = documents(folder / "kustomization.yaml")
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == there


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on this machine")
@pytest.mark.parametrize("folder", [DEPLOY, DEPLOY / "jobs"], ids=lambda p: p.name)
def test_what_kustomize_builds_follows_the_schemas(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "built.yaml"
    built.write_text(done.stdout)
    found = documents(built)
    assert [problem for document in found for problem in problems(document)] == []
    assert {o["metadata"].get("namespace", "modelstore") for o in found} == {"modelstore"}
    images = {c["image"] for _, spec in pod_specs(found) for c in spec["containers"]}
    assert not [image for image in images if ":" not in image], "kustomize did not set the images"
    configs = {o["metadata"]["name"] for o in found if o["kind"] == "ConfigMap"}
    assert folder.name == "jobs" or configs == {"modelstore"}
