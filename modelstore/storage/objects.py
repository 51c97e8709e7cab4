"""Objects in S3, Google Cloud Storage or Azure, through obstore."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from modelstore.errors import CorruptionError, NotFoundError, StorageError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.failures import TransientStorageError, failure
from modelstore.storage.keys import check_key, check_prefix, key_problem
from modelstore.storage.options import (
    ClientSettings,
    StorageOptions,
    aws_credentials,
    azure_settings,
    gcs_settings,
    s3_settings,
)
from modelstore.storage.pieces import fitted, joined

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 << 20  # of a multipart upload
PARALLEL_PARTS = 8
MAX_PARTS = 10_000
SLICE = 32 << 20  # of a read: what one answer holds beside the destination
SLOWEST = 1 << 20  # bytes a second that an upload must reach
UPLOAD_RETRIES = 5
CREDENTIAL_LIFE = timedelta(minutes=30)


class ObjectStorage(Storage):
    """One bucket (or container), under a prefix.

    `create` is one conditional request (`If-None-Match: *`; a generation match on GCS). A request ends when nothing of
    its answer arrives for `stall_seconds`, so that a long answer may take long; an upload, whose answer comes after
    all of its bytes, has the time more that they take at `SLOWEST`. Nothing is retried here (see `retry`) but the
    requests of a `put`.
    """

    def __init__(self, make: Callable[..., ObjectStore], url: str, settings: ClientSettings) -> None:
        self._url = url.rstrip("/")
        timeouts = {"connect_timeout": timedelta(seconds=settings.connect_seconds)}
        stall = timedelta(seconds=settings.stall_seconds)
        self._store = make(
            config=settings.config,
            client_options={**settings.client, **timeouts, "read_timeout": stall, "timeout": timedelta(hours=1)},
            retry_config={"max_retries": 0},
        )
        self._uploads = make(
            config=settings.config,
            client_options={
                **settings.client,
                **timeouts,
                "timeout": stall + timedelta(seconds=PART * PARALLEL_PARTS / SLOWEST),
            },
            retry_config={
                "max_retries": UPLOAD_RETRIES,
                "retry_timeout": timedelta(minutes=3),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
            },
        )

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        check_key(key)
        try:
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise too_large(key, found.meta["size"], limit)
            return found.bytes().to_bytes()
        except Exception as error:
            raise failure(error, key, "read") from error

    def read(self, key: str, start: int, out: memoryview) -> None:
        check_key(key)
        for at in range(0, out.nbytes, SLICE):
            self._read(key, start + at, out[at : at + SLICE])

    def create(self, key: str, data: Buffer) -> bool:
        check_key(key)
        view = as_bytes(data).data
        try:
            obstore.put(self._store if view.nbytes < PART else self._uploads, key, view, mode="create")
        except AlreadyExistsError as error:
            # Also when the client's own retry met the object that its first attempt, answer lost, had made. But a
            # conflict among writers, which S3 answers with 409, says nothing yet.
            problem = failure(error, key, "create")
            if isinstance(problem, TransientStorageError):
                raise problem from error
            return False
        except Exception as error:
            raise failure(error, key, "create") from error
        return True

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        check_key(key)
        part = max(PART, -(-size // MAX_PARTS))
        broken: list[BaseException] = []

        def watched() -> Iterator[memoryview]:
            try:
                yield from fitted(key, pieces, size, part)
            except BaseException as error:
                broken.append(error)
                raise

        try:
            if size <= part:
                obstore.put(self._uploads, key, joined(key, watched(), size), use_multipart=False)
            else:
                obstore.put(self._uploads, key, watched(), chunk_size=part, max_concurrency=PARALLEL_PARTS)
        except Exception as error:
            if broken:  # the caller's own error, not the storage's
                raise broken[0] from None
            problem = failure(error, key, "write")
            if isinstance(problem, TransientStorageError):  # retried already, part by part
                problem = StorageError(f"{problem} (after {UPLOAD_RETRIES + 1} attempts)", object=key)
            raise problem from error

    def info(self, key: str) -> ObjectInfo | None:
        check_key(key)
        try:
            return _info(obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise failure(error, key, "look at") from error

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        page = 1000 if limit is None else min(max(limit, 1), 1000)
        return islice(self._list(prefix, page, after), limit)

    def folders(self, prefix: str) -> tuple[str, ...]:
        check_prefix(prefix)
        try:
            found = obstore.list_with_delimiter(self._store, prefix or None)["common_prefixes"]
        except Exception as error:
            raise failure(error, prefix, "list") from error
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return tuple(sorted(name for name in names if key_problem(prefix + name) is None))

    def delete(self, key: str) -> None:
        check_key(key)
        try:
            obstore.delete(self._store, key)
        except Exception as error:
            problem = failure(error, key, "delete")
            if not isinstance(problem, NotFoundError):
                raise problem from error

    def path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _read(self, key: str, start: int, out: memoryview) -> None:
        try:
            data = memoryview(obstore.get_range(self._store, key, start=start, length=out.nbytes))
        except Exception as error:
            if "status code: 416" in str(error):
                raise _ends_before(key, start + out.nbytes) from error
            raise failure(error, key, "read") from error
        if data.nbytes != out.nbytes:
            raise _ends_before(key, start + out.nbytes)
        out[:] = data

    def _list(self, prefix: str, page: int, after: str) -> Iterator[ObjectInfo]:
        last = ""
        try:
            for batch in obstore.list(self._store, prefix or None, offset=after or None, chunk_size=page):
                for item in map(_info, batch):
                    if (
                        key_problem(item.key) or item.key <= after
                    ):  # not ours, or obstore began earlier (after "a/", say)
                        continue
                    if item.key <= last:  # S3 Express buckets
                        raise StorageError(f"{self.url} does not list its objects in order; use another bucket.")
                    last = item.key
                    yield item
        except Exception as error:
            raise failure(error, prefix, "list") from error


def _object_storage(make: Callable[..., ObjectStore], url: str, settings: ClientSettings) -> ObjectStorage:
    try:
        return ObjectStorage(make, url, settings)
    except BaseError as error:
        said = str(error).split("\n\nDebug source", 1)[0]
        raise ValueError(f"Cannot open {url}: {said}") from error


def s3_storage(bucket: str, prefix: str, options: StorageOptions) -> ObjectStorage:
    """A bucket of S3, or of a server that speaks like it; a server of one's own is addressed by path."""
    settings = s3_settings(options)
    extra: dict[str, Any] = {}
    if session := aws_credentials(settings):
        if (region := session.get_config_variable("region")) and "region" not in settings.config:
            settings.config["region"] = region
        if (credentials := session.get_credentials()) is not None:
            extra["credential_provider"] = _Credentials(credentials)

    def make(**arguments: Any) -> ObjectStore:
        return S3Store(bucket, prefix=prefix or None, **extra, **arguments)

    return _object_storage(make, f"s3://{bucket}/{prefix}", settings)


def gcs_storage(bucket: str, prefix: str, options: StorageOptions) -> ObjectStorage:
    """A bucket of Google Cloud Storage."""

    def make(**arguments: Any) -> ObjectStore:
        return GCSStore(bucket, prefix=prefix or None, **arguments)

    return _object_storage(make, f"gs://{bucket}/{prefix}", gcs_settings(options))


def azure_storage(container: str, prefix: str, options: StorageOptions) -> ObjectStorage:
    """A container of Azure Blob Storage."""

    def make(**arguments: Any) -> ObjectStore:
        return AzureStore(container, prefix=prefix or None, **arguments)

    return _object_storage(make, f"az://{container}/{prefix}", azure_settings(options))


class _Credentials:
    """botocore's credentials, which it renews itself, for obstore."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + CREDENTIAL_LIFE,
        }


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())


def _ends_before(key: str, end: int) -> CorruptionError:
    return CorruptionError(f"Object {key!r} ends before byte {end:,}.", object=key)
