"""What a user says about an object store (in fsspec's words), as its client's configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelstore.errors import UnsupportedError

StorageOptions = Mapping[str, Any]

CONNECT_SECONDS = 5.0
STALL_SECONDS = 20.0  # without a byte of the answer


@dataclass(frozen=True)
class ClientSettings:
    """One object store's client: where, as whom, and how long it may be silent."""

    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    connect_seconds: float = CONNECT_SECONDS
    stall_seconds: float = STALL_SECONDS
    profile: str | None = None


class _Taker:
    """Takes options one by one, so that what is left over is unknown."""

    def __init__(self, options: StorageOptions, where: str) -> None:
        self._left = dict(options)
        self._where = where

    def take(self, *names: str) -> Any:
        """The value under the first of these names that has one, None without."""
        values = [self._left.pop(name, None) for name in names]
        return next((value for value in values if value is not None), None)

    def nested(self, name: str) -> _Taker:
        value = self._left.pop(name, None) or {}
        if not isinstance(value, Mapping):
            raise ValueError(f"Invalid {self._where} {name!r}: it must be a mapping.")
        return _Taker(value, f"{self._where} {name}")

    def done(self, scheme: str) -> None:
        if self._left:
            raise ValueError(f"Unknown {self._where} for {scheme}://: {', '.join(sorted(map(repr, self._left)))}.")


def s3_settings(options: StorageOptions) -> ClientSettings:
    """For S3 and what speaks like it, from s3fs's options; what they leave open comes from AWS_* in the environment."""
    given = _Taker(options, "storage option")
    client, extra, network = (
        given.nested("client_kwargs"),
        given.nested("s3_additional_kwargs"),
        given.nested("config_kwargs"),
    )
    addressing = network.nested("s3")
    endpoint = _first(given.take("endpoint_url"), client.take("endpoint_url"))
    insecure = given.take("use_ssl") is False or client.take("use_ssl") is False
    config = {
        "endpoint": endpoint,
        "region": _first(given.take("region", "region_name"), client.take("region_name")),
        "access_key_id": _first(given.take("key", "username"), client.take("aws_access_key_id")),
        "secret_access_key": _first(given.take("secret", "password"), client.take("aws_secret_access_key")),
        "session_token": _first(given.take("token"), client.take("aws_session_token")),
        "skip_signature": given.take("anon") or None,
        "request_payer": given.take("requester_pays") or None,
        "server_side_encryption": extra.take("ServerSideEncryption"),
        "sse_kms_key_id": extra.take("SSEKMSKeyId"),
        "virtual_hosted_style_request": (addressing.take("addressing_style") == "virtual") or None,
        # One object a request works everywhere; the bulk request is missing in some servers, and saves us nothing.
        "disable_bulk_delete": True,
    }
    found = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    http: dict[str, Any] = {"allow_http": insecure or found.startswith("http://")}
    verify = client.take("verify")
    if verify is False:
        http["allow_invalid_certificates"] = True
    elif bundle := (verify if isinstance(verify, str) else os.environ.get("AWS_CA_BUNDLE")):
        http["root_certificate"] = Path(bundle).read_bytes()
    connect, stall, profile = network.take("connect_timeout"), network.take("read_timeout"), given.take("profile")
    for taker in (given, client, extra, network, addressing):
        taker.done("s3")
    return ClientSettings(
        _known(config), http, float(connect or CONNECT_SECONDS), float(stall or STALL_SECONDS), profile
    )


def gcs_settings(options: StorageOptions) -> ClientSettings:
    """For Google Cloud Storage, from gcsfs's options; otherwise the default credentials of the environment."""
    given = _Taker(options, "storage option")
    token, endpoint = given.take("token"), given.take("endpoint_url")
    given.take("project")  # needed only to make buckets
    given.done("gs")
    config: dict[str, Any] = {"base_url": endpoint}
    if isinstance(token, Mapping):
        config["service_account_key"] = json.dumps(dict(token))
    elif token == "anon":
        config["skip_signature"] = True
    elif token not in (None, "google_default", "cloud"):
        config["service_account"] = str(token)
    return ClientSettings(_known(config), {"allow_http": (endpoint or "").startswith("http://")})


def azure_settings(options: StorageOptions) -> ClientSettings:
    """For Azure Blob Storage, from adlfs's options; otherwise AZURE_* in the environment."""
    given = _Taker(options, "storage option")
    parts = dict(item.split("=", 1) for item in (given.take("connection_string") or "").split(";") if "=" in item)
    endpoint = _first(given.take("account_host", "endpoint_url"), parts.get("BlobEndpoint"))
    config = {
        "account_name": _first(given.take("account_name"), parts.get("AccountName")),
        "account_key": _first(given.take("account_key"), parts.get("AccountKey")),
        "sas_key": _first(given.take("sas_token"), parts.get("SharedAccessSignature")),
        "tenant_id": given.take("tenant_id"),
        "client_id": given.take("client_id"),
        "client_secret": given.take("client_secret"),
        "skip_signature": given.take("anon") or None,
        "endpoint": endpoint,
    }
    given.done("az")
    return ClientSettings(_known(config), {"allow_http": (endpoint or "").startswith("http://")})


def aws_credentials(settings: ClientSettings) -> Any:
    """A botocore session for credentials that lie in AWS's own files (profiles, SSO), None where none are needed.

    Keys given outright or in the environment need no file; roles of machines and containers are found by the client.
    """
    profile = settings.profile or os.environ.get("AWS_PROFILE")
    if {"access_key_id", "skip_signature"} & settings.config.keys():
        return None
    if settings.profile is None and os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    if profile is None and not any(Path(file).expanduser().is_file() for file in files):
        return None
    try:
        import botocore.session  # type: ignore[import-untyped]
    except ImportError:
        if profile is None:
            return None
        raise UnsupportedError(
            f"The AWS profile {profile!r} needs the package botocore: pip install 'modelstore[s3]'."
        ) from None
    return botocore.session.Session(profile=profile)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
