"""AWS's configuration as botocore reads it: where a bucket is, and as whom. obstore then carries the bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from modelstore.errors import StorageError, UnsupportedError
from modelstore.format.locks import Lock
from modelstore.paths import from_home, read_named
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.remote.causes import cause_of
from modelstore.storage.remote.options import ClientSettings, S3Options

# obstore asks again when less than five minutes are left: so each minute, and botocore renews ten minutes ahead.
_LARGEST = 16 << 20  # bytes of a bundle of certificates
RENEWED = timedelta(minutes=6)


def s3_settings(bucket: str, options: S3Options) -> ClientSettings:
    """The client of a bucket, from what was said and, where nothing was, from botocore: environment, profiles, services.

    Nothing is asked of the network. `ValueError` if the configuration names no endpoint, profile or region that can be.
    """
    session, core = _session(options.profile), _botocore()
    try:
        base, region = _base(session, bucket, options)
    except (core["BotoCoreError"], ValueError) as error:
        raise ValueError(
            f"cannot open s3://{bucket}: {' '.join(str(error).split()).rstrip('.')}; check the AWS configuration and the options"
        ) from error
    parts = urlsplit(base)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or any(c.isspace() or not c.isprintable() for c in base)
    ):
        raise ValueError(f"cannot open s3://{bucket}: the endpoint {base!r} is not a URL like https://host:port")
    config = {
        **options.client,
        # The whole address, bucket and all, as botocore forms it: obstore adds the key.
        "endpoint": base,
        "virtual_hosted_style_request": True,
        "region": region,
        "skip_signature": options.anonymous,
    }
    http: dict[str, Any] = {"allow_http": parts.scheme == "http"}
    verify = options.verify if options.verify is not None else session.get_config_variable("ca_bundle")
    if verify is False:
        http["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        try:
            http["root_certificate"] = read_named(from_home(verify), _LARGEST)
        except OSError as error:
            raise ValueError(
                f"cannot read the CA bundle {verify!r} (AWS_CA_BUNDLE or verify): {error.strerror}"
            ) from error
    credentials = None if options.anonymous else Credentials(session, options)
    return ClientSettings(config, http, options.connect_seconds, options.stall_seconds, credentials)


class _Nothing(io.BytesIO):
    """The body of an answer without one."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        return iter(())


class Credentials:
    """Keys for obstore: those given, else botocore's (profile, SSO, roles, processes, containers, machines), which it renews."""

    def __init__(self, session: Any, options: S3Options) -> None:
        self._session = session
        self._options = options
        self._lock = Lock()
        self._found: Any = None

    def __call__(self) -> dict[str, Any]:
        """The keys now. `StorageError` if there are none, or they cannot be renewed."""
        given = self._options
        if given.key is not None:
            return _keys(given.key, given.secret, given.token, renewed=False)
        with self._lock:
            try:
                if self._found is None:
                    self._found = self._session.get_credentials()
                now = self._found.get_frozen_credentials() if self._found is not None else None
            except Exception as error:  # whatever a chain of files, processes and servers may raise
                cause = cause_of(error)
                raise (TransientStorageError if cause.passes else StorageError)(str(cause)) from error
            if now is None or not now.access_key:
                raise StorageError(
                    "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile (AWS_PROFILE),"
                    " or say anon=True in storage_options for a public bucket"
                )
            return _keys(now.access_key, now.secret_key, now.token, renewed=hasattr(self._found, "refresh_needed"))


def _keys(key: str, secret: str | None, token: str | None, *, renewed: bool) -> dict[str, Any]:
    found = {"access_key_id": key, "secret_access_key": secret, "token": token}
    for name, value in found.items():
        if value is not None:
            found[name] = value = value.strip()  # a line's end, as files and shells add it
            if not value.isascii() or not value.isprintable() or " " in value:
                raise StorageError(
                    f"the AWS credentials are not valid: their {name} has characters that no header can carry"
                )
    return {**found, "expires_at": datetime.now(UTC) + RENEWED if renewed else None}


def _base(session: Any, bucket: str, options: S3Options) -> tuple[str, str]:
    """The URL of a bucket's keys, and the region that requests are signed for."""
    core = _botocore()
    # AWS_REGION is not botocore's, but every other client's.
    region = (
        options.region or session.get_config_variable("region") or os.environ.get("AWS_REGION") or ""
    ).strip() or None
    client = session.create_client(
        "s3",
        region_name=region,
        endpoint_url=options.endpoint,
        use_ssl=options.tls,
        config=core["Config"](
            signature_version=core["UNSIGNED"],
            s3=dict(options.style) or None,
            retries={"total_max_attempts": 1},
            **options.flags,
        ),
        aws_access_key_id="-",  # or it would look for credentials now, on the network perhaps
        aws_secret_access_key="-",
    )
    sent: list[str] = []

    def instead(request: Any, **_: Any) -> Any:
        sent.append(request.url)
        return core["AWSResponse"](request.url, 200, {}, _Nothing())

    client.meta.events.register("before-send.s3", instead)
    client.head_object(Bucket=bucket, Key="k")
    return sent[0].partition("?")[0].removesuffix("/k"), client.meta.region_name or "us-east-1"


def _session(profile: str | None) -> Any:
    core = _botocore()
    session = core["Session"](profile=profile)
    session.register_component("data_loader", _loader())
    try:
        session.get_scoped_config()
    except core["BotoCoreError"] as error:  # no such profile, or a file that is none
        raise ValueError(f"invalid AWS configuration: {str(error).rstrip('.')}") from error
    return session


@cache
def _loader() -> Any:
    """The reader of botocore's descriptions of services: made once in a process."""
    from botocore.session import Session

    return Session().get_component("data_loader")


@cache
def _botocore() -> Mapping[str, Any]:
    try:
        import botocore.awsrequest
        import botocore.config
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        raise UnsupportedError(
            f"s3:// needs the package {error.name}, which reads AWS's configuration: pip install 'modelstore[s3]'"
        ) from None
    return {
        "Session": botocore.session.Session,
        "Config": botocore.config.Config,
        "AWSResponse": botocore.awsrequest.AWSResponse,
        "BotoCoreError": botocore.exceptions.BotoCoreError,
        "UNSIGNED": botocore.UNSIGNED,
    }
