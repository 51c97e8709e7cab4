"""A user's options for an object store (in fsspec's words), as its client's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

StorageOptions = Mapping[str, Any]

CONNECT_SECONDS = 5.0
STALL_SECONDS = 20.0  # without a byte of the answer
_SECRET = frozenset(
    (
        "account_key",
        "auth",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "client_secret",
        "connection_string",
        "cookies",
        "credential",
        "headers",
        "key",
        "passphrase",
        "passwd",
        "password",
        "pkey",
        "private_key",
        "sas_token",
        "secret",
        "token",
        "username",
    )
)
_STYLES = ("addressing_style", "use_accelerate_endpoint", "us_east_1_regional_endpoint")


@dataclass(frozen=True)
class ClientSettings:
    """One object store's client: where, as whom, and how long it may be silent.

    `credentials`, where there is one, gives obstore keys, again whenever they may have been renewed.
    """

    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    connect_seconds: float = CONNECT_SECONDS
    stall_seconds: float = STALL_SECONDS
    credentials: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class S3Options:
    """The options for S3, None for those left to AWS's own configuration."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    key: str | None = None
    secret: str | None = None
    token: str | None = None
    anonymous: bool = False
    tls: bool = True
    verify: bool | str | None = None
    style: Mapping[str, Any] = field(default_factory=dict)  # botocore's `s3` configuration
    flags: Mapping[str, Any] = field(default_factory=dict)  # of botocore's `Config`
    client: Mapping[str, Any] = field(default_factory=dict)  # obstore's own
    connect_seconds: float = CONNECT_SECONDS
    stall_seconds: float = STALL_SECONDS


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
            raise ValueError(f"invalid {self._where} {name!r}: it must be a mapping")
        return _Taker(value, f"{self._where} {name}")

    def done(self, scheme: str) -> None:
        if self._left:
            raise ValueError(f"unknown {self._where} for {scheme}://: {', '.join(sorted(map(repr, self._left)))}")


def s3_options(options: StorageOptions) -> S3Options:
    """For S3 and what speaks like it, from s3fs's options; `ValueError` names what is unknown or cannot be."""
    given = _Taker(options, "storage option")
    client, extra, network = (
        given.nested("client_kwargs"),
        given.nested("s3_additional_kwargs"),
        given.nested("config_kwargs"),
    )
    style = network.nested("s3")
    tls = [given.take("use_ssl"), client.take("use_ssl")]
    own = {
        "request_payer": given.take("requester_pays") or None,
        "server_side_encryption": extra.take("ServerSideEncryption"),
        "sse_kms_key_id": extra.take("SSEKMSKeyId"),
        # One object a request works everywhere; the bulk request is missing in some servers, and saves us nothing.
        "disable_bulk_delete": True,
    }
    found = S3Options(
        endpoint=_first(given.take("endpoint_url"), client.take("endpoint_url")),
        region=_first(given.take("region", "region_name"), client.take("region_name")),
        profile=given.take("profile"),
        key=_printable("key", _first(given.take("key", "username"), client.take("aws_access_key_id"))),
        secret=_printable("secret", _first(given.take("secret", "password"), client.take("aws_secret_access_key"))),
        token=_printable("token", _first(given.take("token"), client.take("aws_session_token"))),
        anonymous=bool(given.take("anon")),
        tls=False not in tls,
        verify=client.take("verify"),
        style=_known({name: style.take(name) for name in _STYLES}),
        flags=_known({name: network.take(name) for name in ("use_dualstack_endpoint", "use_fips_endpoint")}),
        client=_known(own),
        connect_seconds=float(network.take("connect_timeout") or CONNECT_SECONDS),
        stall_seconds=float(network.take("read_timeout") or STALL_SECONDS),
    )
    for taker in (given, client, extra, network, style):
        taker.done("s3")
    if (found.key is None) != (found.secret is None):
        raise ValueError("invalid storage options for s3://: key and secret go together")
    if (wanted := found.style.get("addressing_style")) not in (None, "auto", "path", "virtual"):
        raise ValueError(f"invalid addressing_style {wanted!r}: one of auto, path, virtual")
    return found


def _printable(name: str, value: Any) -> str | None:
    """A key without the white space around it, which files and shells add; `ValueError`, without its text, for no key."""
    if value is None:
        return None
    text = str(value).strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"invalid storage option {name!r}: it is empty, or has characters that no header can carry")
    return text


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


def without_secrets(options: StorageOptions) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options that may be written down, and the names of those that may not."""
    public: dict[str, Any] = {}
    withheld: list[str] = []
    for name, value in options.items():
        if name in _SECRET and value not in (None, "", "anon", "google_default", "cloud"):
            withheld.append(name)
        elif isinstance(value, Mapping):
            public[name], more = without_secrets(value)
            withheld += more
        else:
            public[name] = value
    return public, tuple(withheld)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
