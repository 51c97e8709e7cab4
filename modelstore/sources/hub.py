"""Models of the Hugging Face Hub, and of its cache on this machine, as a source.

Weights go from the Hub into the store range by range, as they are encoded: there is no second copy of them on disk. In the
temporary folder that stands for the repository they are sparse files, which have their size and nothing else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from modelstore.errors import ConflictError, FormatError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.files.checkpoint import PIPELINE
from modelstore.format.names import check_file
from modelstore.sources import safetensors
from modelstore.sources.base import Source
from modelstore.sources.local.reading import Files
from modelstore.sources.local.states import State

SCHEME = "hf://"
FROM = "huggingface.source"  # in a version's metadata: what it was saved from, with the commit
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHE = re.compile(r"models--(?P<id>.+)")
_TABLE = 64 << 20  # an index or header that is fetched before the source is opened
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
MAX_FILES = 100_000


@dataclass(frozen=True, slots=True)
class Repository:
    """A model at one commit of a Hub, its files' sizes, and the SHA-256 of those that it keeps in LFS."""

    name: str
    commit: str
    endpoint: str
    sizes: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.commit}"


def hub_id(what: object) -> tuple[str, str | None] | None:
    """(org/name, revision) where `what` is an address of a Hub: `hf://org/name[@revision]`, or `org/name[@revision]`.

    The short form counts only where nothing of this machine can be meant: no file or folder `org/name`, and no folder `org`.
    """
    if not isinstance(what, str):
        return None
    explicit = what.startswith(SCHEME)
    name, at, revision = what.removeprefix(SCHEME).partition("@")
    if not _ID.fullmatch(name) or ".." in name or (at and not revision):
        if explicit:
            raise ValueError(f"{what!r} is not an address of a Hub: write hf://org/name or hf://org/name@revision")
        return None
    if not explicit and (Path(what).exists() or Path(name.partition("/")[0]).exists() or Path(name).suffix in _TORCH):
        return None
    return name, revision or None


def cached_snapshot(folder: Path) -> Path | None:
    """The snapshot that a model's folder of a Hub cache stands for; None for any other folder.

    That of `refs/main`, else the only one there is. `FormatError` if that does not tell.
    """
    if not _CACHE.fullmatch(folder.name) or not (folder / "snapshots").is_dir():
        return None
    there = sorted(entry.name for entry in (folder / "snapshots").iterdir() if _COMMIT.fullmatch(entry.name))
    main = folder / "refs" / "main"
    named = main.read_text().strip() if main.is_file() and main.stat().st_size < 100 else ""
    if named in there:
        return folder / "snapshots" / named
    if len(there) == 1:
        return folder / "snapshots" / there[0]
    raise FormatError(
        f"{folder} has {len(there)} snapshots and no main among them: give the folder of one ({', '.join(there[:4]) or 'none'})",
        object=str(folder),
    )


def open_hub(name: str, revision: str | None, given: str) -> Source | Path:
    """A model of the Hub at one commit; a folder of the local cache, where HF_HUB_OFFLINE says so or it is whole there."""
    hub = _hub()
    with _said(hub, name, revision, given):
        if hub.constants.HF_HUB_OFFLINE:
            return Path(hub.snapshot_download(name, revision=revision, local_files_only=True))
        repository = _repository(hub, name, revision)
        root = Path(tempfile.mkdtemp(prefix="modelstore-hub-"))
        try:
            return _open(hub, repository, root)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise


def _repository(hub: Any, name: str, revision: str | None) -> Repository:
    """The repository's content, pinned to the commit that the revision names now."""
    api = hub.HfApi()
    commit = api.model_info(name, revision=revision).sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise FormatError(f"{SCHEME}{name}: the Hub names no commit, but {commit!r}", object=name)
    sizes: dict[str, int] = {}
    digests: dict[str, str] = {}
    for entry in api.list_repo_tree(name, recursive=True, revision=commit):
        size = getattr(entry, "size", None)
        if isinstance(size, int) and size >= 0:  # folders have none
            sizes[check_file(entry.path)] = size
            if lfs := getattr(entry, "lfs", None):
                digests[entry.path] = lfs.sha256
        if len(sizes) > MAX_FILES:
            raise FormatError(f"{SCHEME}{name} has more than {MAX_FILES} files", object=name)
    return Repository(name, commit, api.endpoint, sizes, digests)


def _open(hub: Any, repository: Repository, root: Path) -> Source:
    remote: dict[Path, str] = {}
    for path, size in repository.sizes.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.truncate(size)
        remote[place] = path
        if path.endswith(".json") and size <= _TABLE:  # what says which files are the model
            _fetch(hub, repository, remote, place)
    weights = [path for path in repository.sizes if path.endswith(".safetensors")]
    if not weights:
        return _open_fetched(hub, repository, root, remote)

    def reading(states: Mapping[Path, State]) -> Files:
        return HubFiles(states, hub, repository, remote)

    opening = safetensors.open_pipeline if (root / PIPELINE).exists() else safetensors.open_directory
    looked = opening(root, reading)  # only to learn which files are kept: none has its bytes yet
    kept = [path for path in looked.files.values() if isinstance(path, Path)]
    looked.close()
    for place in kept:
        if place in remote:
            _fetch(hub, repository, remote, place)
    source = opening(root, reading)
    return _known(source, repository, root)


def _open_fetched(hub: Any, repository: Repository, root: Path, remote: dict[Path, str]) -> Source:
    """A repository without safetensors: its files are fetched whole, since such are not read by ranges."""
    from modelstore.sources.pickles import source as pickled

    if not any(path.endswith(_TORCH) for path in repository.sizes):
        raise UnsupportedError(
            f"{repository} has neither safetensors nor files of torch: fetch it ('hf download {repository.name}') and give"
            " what is to be saved",
            object=str(repository),
        )
    need, free = sum(repository.sizes.values()), shutil.disk_usage(root).free
    if need > free:
        raise StorageError(
            f"{repository} has no safetensors and is fetched whole: its {need:,} bytes do not fit in {root.parent}, which has"
            f" {free:,} left (TMPDIR names another place)",
            object=str(repository),
        )
    for place in list(remote):
        _fetch(hub, repository, remote, place)
    return _known(pickled.open_directory(root), repository, root)


class HubFiles(Files):
    """Files at the Hub, read by ranges at one commit, which never changes; others as always."""

    def __init__(
        self, states: Mapping[Path, State], hub: Any, repository: Repository, remote: Mapping[Path, str]
    ) -> None:
        super().__init__(states)
        self._hub = hub
        self._repository = repository
        self._remote = remote

    def read(self, path: Path, start: int, out: Bytes) -> None:
        if path not in self._remote:
            super().read(path, start, out)
        elif len(out):
            with _ranged(self._hub, self._repository, self._remote[path], start, len(out)) as pieces:
                at = 0
                for piece in pieces:
                    out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                    at += len(piece)

    def sample(self, path: Path) -> tuple[State, bytes]:
        if path in self._remote:
            return State.of(path.stat()), b""
        return super().sample(path)


class _HubSource:
    """A source that knows where it is from, and removes its temporary folder."""

    def __init__(self, source: Source, repository: Repository, root: Path) -> None:
        self._source = source
        self._root = root
        self._repository = repository

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @property
    def metadata(self) -> Mapping[str, str]:
        return MappingProxyType({**self._source.metadata, FROM: str(self._repository)})

    @property
    def fingerprint(self) -> str | None:
        # The same commit is the same bytes, wherever the temporary folder lies and whenever it was made.
        return f"{self._repository.endpoint} {self._repository}"

    def close(self) -> None:
        self._source.close()
        shutil.rmtree(self._root, ignore_errors=True)


def _known(source: Source, repository: Repository, root: Path) -> Source:
    return cast(Source, _HubSource(source, repository, root))


def _fetch(hub: Any, repository: Repository, remote: dict[Path, str], place: Path) -> None:
    """Write a file's bytes into its place, which is then no longer read from the Hub. `StorageError`: its SHA-256 differs."""
    path = remote.pop(place)
    size, told = repository.sizes[path], repository.digests.get(path)
    hasher = hashlib.sha256()
    with place.open("r+b") as file:
        if size:
            with _ranged(hub, repository, path, 0, size) as pieces:
                for piece in pieces:
                    file.write(piece)
                    if told:
                        hasher.update(piece)
    if told and hasher.hexdigest() != told:
        raise StorageError(
            f"{repository}: the bytes of {path} do not have the SHA-256 that the Hub names: save again", object=path
        )


@contextmanager
def _ranged(hub: Any, repository: Repository, path: str, start: int, length: int) -> Iterator[Iterator[bytes]]:
    """The bytes of a range, in pieces; `StorageError` unless they are exactly so many."""
    url = hub.hf_hub_url(repository.name, path, revision=repository.commit, endpoint=repository.endpoint)
    headers = {
        **hub.utils.build_hf_headers(),
        "Range": f"bytes={start}-{start + length - 1}",
        "Accept-Encoding": "identity",
    }

    def pieces(answer: Any) -> Iterator[bytes]:
        got = 0
        for piece in answer.iter_raw(1 << 20):
            got += len(piece)
            if got > length:
                break
            yield piece
        if got != length:
            raise StorageError(
                f"{repository}: the Hub gave {got:,} of {length:,} bytes of {path} from {start:,}: save again, which goes on",
                object=path,
            )

    with (
        _said(hub, repository.name, repository.commit, str(repository)),
        hub.utils.http_stream_backoff("GET", url, headers=headers, timeout=30) as answer,
    ):
        hub.utils.hf_raise_for_status(answer)
        whole = start == 0 and length == repository.sizes[path]
        if answer.status_code != 206 and not (whole and answer.status_code == 200):
            raise StorageError(
                f"{repository}: the Hub does not answer with the range of {path} that was asked for ({answer.status_code})",
                object=path,
            )
        yield pieces(answer)


@contextmanager
def _said(hub: Any, name: str, revision: str | None, given: str) -> Iterator[None]:
    """The Hub client's errors as ours: what was asked for, where, and what to do."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise StorageError(
            f"{name} at {endpoint} is gated: accept its terms there, and give a token of yours by HF_TOKEN", object=name
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{name} at {endpoint} has no revision {revision!r}: name another", object=name) from error
    except errors.RepositoryNotFoundError as error:
        here = "" if given.startswith(SCHEME) else f", and {given} is not a file or folder here"
        raise NotFoundError(
            f"there is no model {name} at {endpoint} that this user may see{here}: check its name, or give a token by HF_TOKEN",
            object=name,
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise NotFoundError(
            f"{name} is not in the Hub cache of this machine, or not whole, and HF_HUB_OFFLINE is set: unset it, or fetch it",
            object=name,
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        raise StorageError(
            f"{endpoint} answered {status} for {name}: try again later, or check HF_TOKEN", object=name
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{given!r} is not an address of a Hub: {error}") from error
    except (ConflictError, FormatError, NotFoundError, StorageError, UnsupportedError):
        raise
    except OSError as error:
        raise StorageError(f"cannot read {name} from {endpoint}: {error.strerror or error}", object=name) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise StorageError(
            f"there is no folder {name} here, and {endpoint} cannot be reached for it ({str(error) or type(error).__name__}): "
            "check the path, or HF_ENDPOINT and the network, or set HF_HUB_OFFLINE=1 to read the cache",
            object=name,
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UnsupportedError("hf:// needs the package huggingface_hub: pip install 'modelstore[hub]'") from None
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub
