"""docker/compose.yaml: against the Compose specification, the command line, and what is safe on one's own machine."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.checking import ROOT, compose_problems, documents, parse_command, size

PATH = ROOT / "docker/compose.yaml"
(COMPOSE,) = documents(PATH)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "s3"}
NODES = {name: service for name, service in OURS.items() if "command" in service}


def test_compose_follows_its_schema() -> None:
    assert compose_problems(COMPOSE) == []


@pytest.mark.parametrize(
    ("service", "field", "value"),
    [("head", "helthcheck", {}), ("s3", "ports", 8333), ("worker-1", "depends_on", {"head": {"condition": "up"}})],
)
def test_broken_compose_is_found(service: str, field: str, value: object) -> None:
    broken = copy.deepcopy(COMPOSE)
    broken["services"][service][field] = value
    assert compose_problems(broken)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    return path


@pytest.mark.parametrize("name", NODES)
def test_commands_exist_and_agree(name: str, token: Path) -> None:
    options = parse_command(NODES[name]["command"], token)
    address = SERVICES["head"]["networks"]["cluster"]["ipv4_address"]
    assert options["token_file"] == token
    assert options["block"]
    if name == "head":
        assert (options["host"], options["address"]) == (address, None)
        assert options["replicas"] <= len(NODES)
        # Chunks, as much as a quarter of the whole for decoded models, and Ray's 128 MiB.
        shared = size(NODES[name]["shm_size"].replace("gb", "GiB"))
        assert options["memory"] + options["images"] + options["pending"] + (128 << 20) <= shared
    else:
        assert options["address"] == f"{address}:{parse_command(SERVICES['head']['command'], token)['port']}"
        assert NODES[name]["depends_on"] == {"head": {"condition": "service_healthy"}}
    parse_command(NODES[name]["healthcheck"]["test"][1:])
    volume, _, mounted = NODES[name]["volumes"][0].partition(":")
    assert mounted == parse_command(SERVICES["head"]["command"], token)["disk"]
    assert volume in COMPOSE["volumes"]


def test_only_the_own_machine_can_reach_it() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


def test_nodes_write_only_where_they_may() -> None:
    for service in OURS.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["tmpfs"][0].startswith("/tmp:")
        assert service["shm_size"] == "4gb"


def test_every_service_says_when_it_works() -> None:
    assert NODES.keys() == {"head", "worker-1", "worker-2"}
    assert all(service["healthcheck"].get("test") for service in [SERVICES["s3"], *NODES.values()])
    assert SERVICES["cli"]["profiles"], "what is no node starts only when it is asked for"
    waited = {name for service in SERVICES.values() for name in service.get("depends_on", {})}
    assert waited == {"s3", "head"}


def test_images_are_exact() -> None:
    for service in SERVICES.values():
        tag = service["image"].partition(":")[2]
        assert tag
        assert tag != "latest"
    assert {service["image"] for service in OURS.values()} == {"modelstore:cpu"}
    build = SERVICES["head"]["build"]
    assert (PATH.parent / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_secrets_are_made_read_and_never_committed(tmp_path: Path) -> None:
    folder = tmp_path / "docker"
    folder.mkdir()
    script = folder / "secrets.sh"
    script.write_text((PATH.parent / "secrets.sh").read_text())
    subprocess.run(["sh", str(script)], check=True, timeout=30)
    made = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    assert {entry["file"] for entry in COMPOSE["secrets"].values()} == {f"secrets/{name}" for name in made}
    assert all(set(service["secrets"]) <= COMPOSE["secrets"].keys() for service in SERVICES.values())
    assert re.fullmatch(r"[0-9a-f]{64}", made["token"])
    (identity,) = json.loads(made["s3.json"])["identities"]
    key = identity["credentials"][0]
    assert f"aws_access_key_id = {key['accessKey']}\n" in made["aws_credentials"]
    assert f"aws_secret_access_key = {key['secretKey']}\n" in made["aws_credentials"]
    assert (folder / "secrets").stat().st_mode & 0o77 == 0
    subprocess.run(["sh", str(script)], check=True, timeout=30)
    assert {path.name: path.read_text() for path in (folder / "secrets").iterdir()} == made, "made anew"
    assert "secrets/" in (PATH.parent / ".gitignore").read_text().split()


def test_clients_find_their_secrets_where_they_are_mounted() -> None:
    for service in OURS.values():
        mounted = {f"/run/secrets/{name}" for name in service["secrets"]}
        environment = service["environment"]
        assert environment["AWS_SHARED_CREDENTIALS_FILE"] in mounted
        assert environment["RAY_AUTH_TOKEN_PATH"] in mounted
        assert not [name for name in environment if re.search("KEY|PASSWORD|SECRET", name)]


def test_the_server_is_new_enough_for_atomic_commits() -> None:
    # Before 4.18 two conditional writes at once could both succeed (seaweedfs/seaweedfs#8800).
    version = SERVICES["s3"]["image"].rpartition(":")[2]
    assert tuple(map(int, version.split("."))) >= (4, 18)
    assert (
        f"-bucket={SERVICES['head']['environment']['MODELSTORE_URL'].removeprefix('s3://')}"
        in SERVICES["s3"]["command"]
    )


def test_script_can_be_run() -> None:
    assert os.access(PATH.parent / "secrets.sh", os.X_OK)
