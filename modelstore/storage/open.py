"""A storage from its URL."""

from __future__ import annotations

import importlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.format.digest import name_of
from modelstore.paths import from_home
from modelstore.storage.added import added, open_added
from modelstore.storage.address import local_path, normal
from modelstore.storage.base import Storage
from modelstore.storage.failures import cannot_open
from modelstore.storage.keys import check_prefix
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.remote.exclusive import ProvedStorage
from modelstore.storage.remote.filesystem import FsspecStorage, require_exclusive_create
from modelstore.storage.remote.forks import OpenedAnew
from modelstore.storage.remote.options import StorageOptions, s3_options, without_secrets
from modelstore.storage.retry import RetryingStorage
from modelstore.storage.wrapping import ReadOnlyStorage, WrappingStorage

log = logging.getLogger("modelstore")
ENGINES = ("obstore", "s3fs")
_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_LEADING = ("AWS_", "AZURE_", "GOOGLE_")  # what of the environment leads to a server
_READ_ONLY = ("http", "https", "data", "github", "git", "zip", "tar", "reference")
_MAKERS = {"s3": "s3_storage", "gs": "gcs_storage", "az": "azure_storage"}


def open_storage(
    url: str | os.PathLike[str],
    storage_options: StorageOptions | None = None,
    engine: str | None = None,
    *,
    read_only: bool = False,
) -> Storage:
    """The storage at `url`: a path, `file://`, `memory://`, `s3://`, `gs://`, `az://`/`abfs://`, one of another package (see
    `added`), or another of fsspec's.

    `storage_options` are fsspec's for that protocol, or those of the other package. `engine` chooses the client of `s3://`:
    obstore (the default) or s3fs. Nothing is asked of the network yet. A storage that cannot create objects exclusively is
    refused with `UnsupportedError`, unless it is opened with `read_only`; everything remote is retried.
    """
    text, options = normal(url), dict(storage_options or {})
    if not text:
        raise ValueError("invalid URL '': give a folder, or a URL like s3://bucket/prefix")
    if engine not in (None, *ENGINES):
        raise ValueError(f"invalid engine {engine!r}: one of {', '.join(ENGINES)}")
    here = local_path(url)
    scheme, _, rest = text.partition("://")
    if here is not None:
        storage = _local(here, options, engine)
    elif scheme == "memory":
        _no_more(options, engine, scheme)
        storage = MemoryStorage(rest.strip("/"))
    elif scheme in _SCHEMES and "::" not in text:
        storage = _object_store(_SCHEMES[scheme], text, options, engine, _pickled(text, options, engine, read_only))
    elif scheme in added() and "::" not in text:
        _no_engine(engine, scheme)
        storage = _added(scheme, text, options, read_only)
    else:
        storage = _filesystem(scheme, text, options, engine, read_only, _pickled(text, options, engine, read_only))
    return ReadOnlyStorage(storage) if read_only else storage


def open_target(url: str, storage_options: StorageOptions | None = None) -> Storage:
    """A storage for files of other programs, which need not create objects exclusively.

    `memory://` is fsspec's. `UnsupportedError` for what can only be read.
    """
    url = normal(url)
    scheme = url.partition("://")[0]
    if scheme in _READ_ONLY or "::" in url:
        raise UnsupportedError(f"{_shown(url)} can only be read: give a folder, or a URL like s3://bucket/prefix")
    options = dict(storage_options or {})
    storage: Storage
    if scheme == "memory":
        storage = _filesystem(scheme, url, options, None, True, _pickled(url, options, None, True))
    else:
        read_only = open_storage(url, options, read_only=True)
        assert isinstance(read_only, ReadOnlyStorage)
        storage = read_only.inner
    if isinstance(storage, RetryingStorage) and isinstance(storage.inner, ProvedStorage):
        storage.inner = storage.inner.inner  # nothing is created exclusively, so nothing of it is tried out there
    return storage


def at_once(storage: Storage) -> Storage:
    """The same storage with no patience: what fails is not repeated."""
    inner = storage
    while isinstance(inner, WrappingStorage):
        if isinstance(inner, RetryingStorage):
            return inner.inner
        inner = inner.inner
    return storage


def _local(path: Path, options: dict[str, Any], engine: str | None) -> Storage:
    _no_more(options, engine, "file")
    return LocalStorage(from_home(path))


def _added(scheme: str, url: str, options: dict[str, Any], read_only: bool) -> Storage:
    """Like every remote storage: proved, retried, and opened again in a forked process. None of its options is known to be
    public.
    """
    opened = partial(open_added, scheme, url, options, _shown(url))
    pickled: tuple[Any, ...] = (_reopened, _shown(url), {}, None, read_only, tuple(sorted(options)))
    return _remote(OpenedAnew(opened(), opened, pickled), scheme, options)


def _pickled(url: str, options: dict[str, Any], engine: str | None, read_only: bool) -> tuple[Any, ...]:
    """How a pickle opens the same place elsewhere: never with the secrets that were given here."""
    public, withheld = without_secrets(options)
    if _shown(url).partition("://")[2] != url.partition("://")[2]:
        withheld = (*withheld, "what the URL had of them")
    return _reopened, _shown(url), public, engine, read_only, withheld


def _reopened(
    url: str, options: dict[str, Any], engine: str | None, read_only: bool, withheld: tuple[str, ...]
) -> OpenedAnew:
    if withheld:
        log.warning(
            "%s is opened from a pickle, in which secrets (%s) do not travel: credentials come from this process's environment",
            url,
            ", ".join(withheld),
        )
    storage: Any = open_storage(url, options, engine, read_only=read_only)
    while not isinstance(storage, OpenedAnew):
        storage = storage.inner
    return storage


def _object_store(
    scheme: str, url: str, options: dict[str, Any], engine: str | None, pickled: tuple[Any, ...]
) -> Storage:
    parts = urlsplit(url, allow_fragments=False)
    container, prefix = parts.netloc, parts.path.strip("/")
    if parts.query:
        raise ValueError(f"invalid URL {scheme}://…: give what follows '?' as storage_options")
    if scheme == "az" and "@" in container:  # abfs://container@account.dfs.core.windows.net/prefix
        container, host = container.split("@", 1)
        options.setdefault("account_name", host.split(".", 1)[0])
    elif "@" in container:
        options.setdefault("key", unquote(parts.username or ""))
        options.setdefault("secret", unquote(parts.password or ""))
        container = container.rsplit("@", 1)[1]
    if not container:
        raise ValueError(f"invalid URL {scheme}://: it names no bucket, as in {scheme}://bucket/prefix")
    check_prefix(prefix and prefix + "/")
    if scheme != "s3":
        _no_engine(engine, scheme)
    again = (
        partial(_s3fs, container, prefix, options)
        if scheme == "s3"
        else partial(_lost, f"{scheme}://{container}/{prefix}")
    )
    if engine == "s3fs":
        return _remote(OpenedAnew(again(), again, pickled), engine, options)
    objects = _needs("modelstore.storage.remote.objects", "obstore", scheme)
    storage = getattr(objects, _MAKERS[scheme])(container, prefix, options)
    # obstore's own threads are made once in a process, and a forked one cannot have others: there s3fs, which can.
    return _remote(OpenedAnew(storage, again, pickled), "obstore", options)


def _lost(url: str) -> Storage:
    raise UnsupportedError(
        f"{url} was opened before this process was forked, and its client does not live through that: "
        "start the workers with 'spawn' (multiprocessing_context='spawn' of a DataLoader), or open the store within them"
    )


def _s3fs(bucket: str, prefix: str, options: dict[str, Any]) -> Storage:
    filesystem = _needs("s3fs", "s3fs", "s3").S3FileSystem
    said = s3_options(options)  # the same options whatever the engine; unknown ones are named
    settings = _needs("modelstore.storage.remote.aws", "botocore", "s3").s3_settings(bucket, said)
    arguments: dict[str, Any] = {
        "key": said.key,
        "secret": said.secret,
        "token": said.token,
        "anon": said.anonymous,
        "profile": said.profile,
        "endpoint_url": said.endpoint,
        "use_ssl": said.tls,
        "requester_pays": bool(said.client.get("request_payer")),
        "s3_additional_kwargs": options.get("s3_additional_kwargs") or {},
        "client_kwargs": {
            "region_name": settings.config["region"],
            **({"verify": said.verify} if said.verify is not None else {}),
        },
        "config_kwargs": {
            "connect_timeout": said.connect_seconds,
            "read_timeout": said.stall_seconds,
            "retries": {"total_max_attempts": 1},
            **({"s3": dict(said.style)} if said.style else {}),
            **said.flags,
        },
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
    once, patient = filesystem(**arguments), filesystem(**arguments)
    once.retries = 1
    require_exclusive_create(once, "s3")
    return FsspecStorage(once, f"{bucket}/{prefix}", f"s3://{bucket}/{prefix}", patient)


def _filesystem(
    scheme: str, url: str, options: dict[str, Any], engine: str | None, read_only: bool, pickled: tuple[Any, ...]
) -> Storage:
    _no_engine(engine, scheme)
    fsspec = _needs("fsspec", "fsspec", scheme)

    def opened() -> Storage:
        try:
            if not read_only:  # before anything is connected
                require_exclusive_create(fsspec.get_filesystem_class(scheme.rpartition("::")[2]), scheme)
            filesystem, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise UnsupportedError(f"{scheme}:// needs another package: {error}") from error
        except ValueError as error:
            known = "write a folder, s3://, gs://, az://, memory://, another protocol of fsspec, or one of an installed package"
            raise ValueError(
                f"invalid URL {_shown(url)!r}: {str(error)[:1].lower()}{str(error)[1:]}: {known}"
            ) from error
        except TypeError as error:  # what the file system's class is made of
            raise ValueError(
                f"{scheme}:// cannot be opened with these options ({str(error)[:200]}): give storage_options as fsspec names them"
            ) from error
        except ModelStoreError:
            raise
        except Exception as error:  # of a client that connects when it is made
            raise cannot_open(error, _shown(url)) from error
        if not read_only:
            require_exclusive_create(filesystem, scheme)
        return FsspecStorage(filesystem, root, _shown(url))

    return _remote(OpenedAnew(opened(), opened, pickled), scheme, options)


def _remote(storage: Storage, client: str, options: dict[str, Any]) -> Storage:
    """Transient failures are retried, and nothing is written before exclusive creation is proved."""
    named = {name: value for name, value in os.environ.items() if name.startswith(_LEADING) or name.endswith("_PROXY")}
    way = repr((client, storage.url, sorted(options.items()), sorted(named.items())))
    return RetryingStorage(ProvedStorage(storage, name_of(way.encode())))  # a digest, as there are keys in it


def _no_more(options: dict[str, Any], engine: str | None, scheme: str) -> None:
    if options:
        raise ValueError(f"unknown storage option for {scheme}://: {', '.join(sorted(map(repr, options)))}")
    _no_engine(engine, scheme)


def _no_engine(engine: str | None, scheme: str) -> None:
    if engine is not None:
        raise ValueError(f"invalid engine {engine!r} for {scheme}://: it serves s3:// only")


def _shown(url: str) -> str:
    """A URL without what may be secret: user, password, query."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rsplit('@', 1)[-1]}{slash}{path}"


def _needs(module: str, package: str, scheme: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UnsupportedError(f"{scheme}:// needs the package {package}: pip install 'modelstore[{scheme}]'") from None
