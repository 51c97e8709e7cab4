"""AWS's configuration is botocore's: endpoint, region, addressing, credentials, from wherever botocore takes them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import StorageError
from modelstore.storage.open import open_storage
from modelstore.storage.remote.options import s3_options
from tests.storage.answers import Answers, answering

pytest.importorskip("obstore")
aws = pytest.importorskip("modelstore.storage.remote.aws")
botocore_session = pytest.importorskip("botocore.session")

KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "hush"}
VIRTUAL = {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}
SERVICES = "[profile x]\nservices = y\nregion = eu-west-1\n[services y]\ns3 =\n  endpoint_url = http://svc.example:1\n"


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def server() -> Iterator[Answers]:
    with answering() as answers:
        yield answers


def base(options: dict[str, Any], bucket: str = "bucket") -> tuple[str, str]:
    config = aws.s3_settings(bucket, s3_options(options)).config
    return config["endpoint"], config["region"]


@pytest.mark.parametrize(
    ("options", "env", "config", "expected"),
    [
        ({}, {}, "", ("https://bucket.s3.amazonaws.com", "us-east-1")),
        ({"region": "eu-west-1\n"}, {}, "", ("https://bucket.s3.eu-west-1.amazonaws.com", "eu-west-1")),
        ({}, {"AWS_REGION": "eu-west-2"}, "", ("https://bucket.s3.eu-west-2.amazonaws.com", "eu-west-2")),
        ({"endpoint_url": "http://host:9"}, {}, "", ("http://host:9/bucket", "us-east-1")),
        ({"endpoint_url": "http://host:9", **VIRTUAL}, {}, "", ("http://bucket.host:9", "us-east-1")),
        (
            {},
            {"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:2"},
            "",
            ("http://b:2/bucket", "us-east-1"),
        ),
        (
            {},
            {"AWS_ENDPOINT_URL": "http://a:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
            "",
            ("https://bucket.s3.amazonaws.com", "us-east-1"),
        ),
        ({}, {}, "[default]\nendpoint_url = http://p:1\nregion = eu-west-1\n", ("http://p:1/bucket", "eu-west-1")),
        ({"profile": "x"}, {}, SERVICES, ("http://svc.example:1/bucket", "eu-west-1")),
        ({}, {"AWS_PROFILE": "x"}, SERVICES, ("http://svc.example:1/bucket", "eu-west-1")),
        ({}, {}, "[default]\ns3 =\n  addressing_style = path\n", ("https://s3.amazonaws.com/bucket", "us-east-1")),
        (
            {"config_kwargs": {"use_dualstack_endpoint": True}, "region": "eu-west-1"},
            {},
            "",
            ("https://bucket.s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1"),
        ),
    ],
)
def test_where(
    options: dict[str, Any],
    env: dict[str, str],
    config: str,
    expected: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config").write_text(config)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert base(options) == expected


@pytest.mark.parametrize("endpoint", ["nonsense", "http://host name", "ftp://host", "http://"])
def test_an_endpoint_that_cannot_be_is_said_when_the_store_is_opened(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        open_storage("s3://bucket/x", {"endpoint_url": endpoint})


def test_no_such_profile() -> None:
    with pytest.raises(ValueError, match=r"invalid AWS configuration: .*\(nope\)"):
        open_storage("s3://bucket/x", {"profile": "nope"})


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_virtual_addressing_with_an_endpoint_of_ones_own_names_the_bucket_in_the_host(
    server: Answers, engine: str
) -> None:
    """Not in the path's first part, which would be another bucket: the prefix's."""
    pytest.importorskip(engine)
    options = {
        "key": "AKID",
        "secret": "hush",
        "endpoint_url": server.endpoint.replace("127.0.0.1", "localhost"),
        **VIRTUAL,
    }
    base_url, _ = base(options)
    assert base_url.startswith("http://bucket.localhost:")
    options = {**options, "endpoint_url": server.endpoint, "config_kwargs": {}}
    open_storage("s3://bucket/prefix", options, engine).get("k")
    assert {path.partition("?")[0] for _, path, _ in server.seen} == {"/bucket/prefix/k"}


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_keys_with_the_end_of_a_line(server: Answers, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)
    options = {"endpoint_url": server.endpoint, "key": "AKID\n", "secret": "hush\r\n", "token": " t\n"}
    open_storage("s3://bucket/x", options, engine).get("k")
    assert server.seen[-1][2]["x-amz-security-token"] == "t"
    assert "Credential=AKID/" in server.seen[-1][2]["authorization"]
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value + "\n")
    if engine == "obstore":
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}, engine).get("k")
        assert "Credential=AKID/" in server.seen[-1][2]["authorization"]


def test_keys_that_no_header_can_carry(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'secret'") as caught:
        open_storage("s3://bucket/x", {"key": "AKID", "secret": "hu\nsh"})
    assert "hu" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hu\nsh")
    with pytest.raises(StorageError, match=r"cannot open s3://bucket/x: .*not valid.*secret_access_key"):
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
    assert not server.seen


def test_no_credentials_are_said_at_once(server: Answers) -> None:
    with pytest.raises(StorageError, match=r"s3://bucket/x: there are no AWS credentials: set AWS_ACCESS_KEY_ID"):
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
    open_storage("s3://bucket/x", {"endpoint_url": server.endpoint, "anon": True}).get("k")
    assert "authorization" not in server.seen[-1][2]


def test_a_profile_wins_over_keys_in_the_environment_when_it_is_named(
    server: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = WORK\naws_secret_access_key = s\n")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another")
    open_storage("s3://bucket/x", {"endpoint_url": server.endpoint, "profile": "work"}).get("k")
    assert "Credential=WORK/" in server.seen[-1][2]["authorization"]
    assert "x-amz-security-token" not in server.seen[-1][2]


def test_a_process_gives_keys_that_are_renewed(server: Answers, tmp_path: Path) -> None:
    counter, script = tmp_path / "count", tmp_path / "give.py"
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    script.write_text(
        f"import json, pathlib\np = pathlib.Path({str(counter)!r})\nn = int(p.read_text()) + 1 if p.exists() else 1\n"
        f"p.write_text(str(n))\nprint(json.dumps({{'Version': 1, 'AccessKeyId': f'GIVEN{{n}}', 'SecretAccessKey': 's',"
        f" 'SessionToken': 't', 'Expiration': {json.dumps(soon)}}}))\n"
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    credentials = aws.s3_settings("bucket", s3_options({})).credentials
    first, second = credentials(), credentials()
    assert (first["access_key_id"][:5], first["token"]) == ("GIVEN", "t")
    assert second["access_key_id"] != first["access_key_id"]  # five minutes are less than botocore leaves unused
    assert first["expires_at"] < datetime.now(UTC) + timedelta(minutes=10)
    open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
    assert "Credential=GIVEN" in server.seen[-1][2]["authorization"]


def test_a_process_that_fails_is_said(server: Answers, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ncredential_process = false\n")
    with pytest.raises(StorageError, match=r"there are no usable credentials .*custom-process"):
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")


def test_a_container_gives_keys(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    given = {"AccessKeyId": "TASK", "SecretAccessKey": "s", "Token": "t", "Expiration": later}
    with answering() as container:
        container.always = (200, json.dumps(given).encode())
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{container.endpoint}/keys")
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
    assert "Credential=TASK/" in server.seen[-1][2]["authorization"]


def test_the_machine_is_not_asked_where_that_is_disabled(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as machine:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", machine.endpoint)
        with pytest.raises(StorageError, match="no AWS credentials"):
            open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
        assert not machine.seen


def test_an_sso_session_that_ended_is_said(server: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config").write_text(
        "[default]\nsso_start_url = https://example.org/start\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r\n"
    )
    with pytest.raises(StorageError, match=r"no usable credentials .*SSO"):
        open_storage("s3://bucket/x", {"endpoint_url": server.endpoint}).get("k")
