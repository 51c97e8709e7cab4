"""Objects in S3, Google Cloud Storage or Azure, through obstore."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from modelstore.errors import ModelStoreError, NotFoundError, StorageError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.failures import TransientStorageError, ends_before, failure, transient
from modelstore.storage.keys import check_key, check_prefix, key_problem
from modelstore.storage.pieces import fitted, joined
from modelstore.storage.remote.aws import s3_settings
from modelstore.storage.remote.options import (
    ClientSettings,
    StorageOptions,
    azure_settings,
    gcs_settings,
    s3_options,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 << 20  # of a multipart upload
PARALLEL_PARTS = 8
MAX_PARTS = 10_000
SLICE = 32 << 20  # of a read: what one answer holds beside the destination
SLOWEST = 1 << 20  # bytes a second that an upload must reach
PART_RETRIES = 3


class ObjectStorage(Storage):
    """One bucket (or container), under a prefix.

    `create` is one conditional request (`If-None-Match: *`; a generation match on GCS). A request ends when nothing of
    its answer arrives for `stall_seconds`, so that a long answer may take long; an upload, whose answer comes after
    all of its bytes, has the time more that they take at `SLOWEST`. Nothing is retried here (see `retry`) but a part of a
    large `put`, a few times, so that one bad moment does not send all parts again.
    """

    def __init__(self, make: Callable[..., ObjectStore], url: str, settings: ClientSettings) -> None:
        self._url = url.rstrip("/")
        self._credentials = settings.credentials
        connect, stall = timedelta(seconds=settings.connect_seconds), timedelta(seconds=settings.stall_seconds)

        def client(retry: dict[str, Any], **timeouts: timedelta) -> ObjectStore:
            options = {**settings.client, "connect_timeout": connect, **timeouts}
            return make(config=settings.config, client_options=options, retry_config=retry)

        once = {"max_retries": 0}
        a_few_times = {
            "max_retries": PART_RETRIES,
            "retry_timeout": timedelta(minutes=1),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
        }
        uploading = stall + timedelta(seconds=PART * PARALLEL_PARTS / SLOWEST)
        self._store = client(once, read_timeout=stall, timeout=timedelta(hours=1))
        self._uploads = client(once, timeout=uploading)
        self._parts = client(a_few_times, timeout=uploading)

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        check_key(key)
        with self._asking("read", key):
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise too_large(key, found.meta["size"], limit)
            return found.bytes().to_bytes()

    def read(self, key: str, start: int, out: memoryview) -> None:
        check_key(key)
        for at in range(0, out.nbytes, SLICE):
            self._read(key, start + at, out[at : at + SLICE])

    def create(self, key: str, data: Buffer) -> bool:
        check_key(key)
        view = as_bytes(data).data
        try:
            with self._asking("create", key):
                try:
                    obstore.put(self._store if view.nbytes < PART else self._uploads, key, view, mode="create")
                except AlreadyExistsError as error:
                    # Also when the client's own retry met the object that its first attempt, answer lost, had made. But a
                    # conflict among writers, which S3 answers with 409, says nothing yet.
                    if not transient(error):
                        return False
                    raise
        except TransientStorageError as problem:
            if not isinstance(problem.__cause__, AlreadyExistsError) or "<Code>" in str(problem.__cause__):
                raise
            if self.info(key) is not None:  # a 409 that does not say why
                return False
            raise
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
            with self._asking("write", key):
                if size <= part:
                    obstore.put(self._uploads, key, joined(key, watched(), size), use_multipart=False)
                else:
                    obstore.put(self._parts, key, watched(), chunk_size=part, max_concurrency=PARALLEL_PARTS)
        except ModelStoreError:
            if broken:  # the caller's own error, not the storage's
                raise broken[0] from None
            raise

    def info(self, key: str) -> ObjectInfo | None:
        check_key(key)
        try:
            with self._asking("look at", key):
                return _info(obstore.head(self._store, key))
        except NotFoundError:
            return None
        except StorageError as error:
            if isinstance(error, TransientStorageError) or "status code" not in str(error.__cause__):
                raise
            problem = error
        # The answer to a HEAD has no body, which alone would say why: that of a reading request has one.
        with self._asking("look at", key):
            obstore.get(self._store, key, options={"range": (0, 1)})
        raise problem

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        page = 1000 if limit is None else min(max(limit, 1), 1000)
        return islice(self._list(prefix, page, after), limit)

    def folders(self, prefix: str) -> tuple[str, ...]:
        check_prefix(prefix)
        with self._asking("list", prefix):
            found = obstore.list_with_delimiter(self._store, prefix or None)["common_prefixes"]
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return tuple(sorted(name for name in names if key_problem(prefix + name) is None))

    def delete(self, key: str) -> None:
        check_key(key)
        with suppress(NotFoundError), self._asking("delete", key):
            obstore.delete(self._store, key)

    @property
    def local(self) -> bool:
        return False

    def path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:  # noqa: ARG002  nothing is left
        return ()

    def _read(self, key: str, start: int, out: memoryview) -> None:
        with self._asking("read", key):
            try:
                data = memoryview(obstore.get_range(self._store, key, start=start, length=out.nbytes))
            except Exception as error:
                if "status code: 416" in str(error):
                    raise ends_before(self.url, key, start + out.nbytes) from error
                raise
        if data.nbytes != out.nbytes:
            raise ends_before(self.url, key, start + out.nbytes)
        out[:] = data

    def _list(self, prefix: str, page: int, after: str) -> Iterator[ObjectInfo]:
        last = ""
        with self._asking("list", prefix):
            for batch in obstore.list(self._store, prefix or None, offset=after or None, chunk_size=page):
                for item in map(_info, batch):
                    if (
                        key_problem(item.key) or item.key <= after
                    ):  # not ours, or obstore began earlier (after "a/", say)
                        continue
                    if item.key <= last:  # S3 Express buckets
                        raise StorageError(
                            f"{self.url} does not list its objects in order: use another bucket", object=prefix
                        )
                    last = item.key
                    yield item

    @contextmanager
    def _asking(self, doing: str, key: str) -> Iterator[None]:
        """Around a request: what its client raises becomes the store's own error, also where its Rust code panics."""
        try:
            if self._credentials is not None:  # for the first request; obstore asks for those of later ones
                self._credentials()
                self._credentials = None
            yield
        except ModelStoreError as error:
            if error.object is None:  # of the credentials
                raise type(error)(f"cannot open {self.url}: {error}", object=key) from error
            raise
        except Exception as error:
            raise failure(error, key, doing, self.url) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise failure(error, key, doing, self.url) from error


def _object_storage(make: Callable[..., ObjectStore], url: str, settings: ClientSettings) -> ObjectStorage:
    try:
        return ObjectStorage(make, url, settings)
    except BaseError as error:
        said = str(error).split("\n\nDebug source", 1)[0]
        where = "; set AZURE_STORAGE_ACCOUNT_NAME, and a key or token" if url.startswith("az:") else ""
        raise ValueError(f"cannot open {url}: {said}{where}") from error


def s3_storage(bucket: str, prefix: str, options: StorageOptions) -> ObjectStorage:
    """A bucket of S3, or of a server that speaks like it, where and as whom botocore says."""
    settings = s3_settings(bucket, s3_options(options))
    extra: dict[str, Any] = {"credential_provider": settings.credentials} if settings.credentials else {}

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


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta["e_tag"] or "")
