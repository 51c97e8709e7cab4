"""Anything that can be saved, opened as a source."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modelstore.errors import FormatError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.files import zarr_names
from modelstore.format.files.checkpoint import PIPELINE
from modelstore.format.given import told
from modelstore.format.names import check_new_files
from modelstore.format.region import Region
from modelstore.paths import explained, from_home
from modelstore.sources import safetensors
from modelstore.sources.base import Source, TensorSpec
from modelstore.sources.choosing import Selection, open_chosen
from modelstore.sources.hub import cached_snapshot, hub_id, open_hub
from modelstore.sources.local.reading import Files, require_file

if TYPE_CHECKING:
    import torch
    import zarr

    Openable = str | Path | Sequence[str | Path] | Mapping[str, Any] | torch.nn.Module | zarr.Group

_PATHS = (  # what a path may lead to
    "a .safetensors, GGUF or torch.save file, a directory of Hugging Face, torch.distributed.checkpoint or Zarr, or a model of "
    "the Hub (hf://org/name)"
)
_ACCEPTED = f"a mapping from names to tensors, a torch module, a list of .safetensors files, or the path of {_PATHS}"
_LOOKS = 10_000  # folders that are looked at for arrays of Zarr
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def open_source(
    what: Openable, *, files: Mapping[str, str | Path | bytes] | None = None, choice: Selection | None = None
) -> Source:
    """The given source, as tensors and files that can be saved; close it when done.

    `what` is a path, an address of the Hub (`hf://org/name[@revision]`), a list of safetensors paths, a mapping from names
    to tensors (torch or NumPy), a `torch.nn.Module` or a `zarr.Group`. `files` adds further files, or replaces those found:
    relative POSIX path → local path, or bytes.
    `choice` says which part of a checkpoint is wanted. Single files are known by their content, not by their names.
    `NotFoundError` if the path does not exist, `FormatError` if what is there is not valid, `UnsupportedError`
    where nothing here can read it, `TypeError` for other kinds of object.
    """
    extra = checked_files(files or {})
    source = open_chosen(what, choice or Selection()) or _dispatch(what)
    try:
        check_new_files({**source.files, **extra})
    except BaseException:
        source.close()
        raise
    return _WithFiles(source, extra) if extra else source


def check_holds(source: Source, what: Any, files: Mapping[str, Any] | None) -> None:
    """Refuse a source without a tensor, as the tensors must be elsewhere; `files` that were given make a version by
    themselves.
    """
    if source.tensors or files:
        return
    if isinstance(what, (str, Path)):
        raise FormatError(f"{what} holds no tensor, so there is nothing to save: give {_PATHS}", object=str(what))
    raise ValueError(f"source is {told(what)} and holds no tensor, so there is nothing to save: give {_ACCEPTED}")


def _dispatch(what: Any) -> Source:
    if isinstance(what, (str, Path)):
        return _open_path(what)
    if isinstance(what, Mapping):
        from modelstore.sources.torch import open_state_dict

        return open_state_dict(what)
    # An instance of a class can only exist once its module is imported: so neither library is imported to look.
    if "torch" in sys.modules:
        import torch

        if isinstance(what, torch.nn.Module):
            from modelstore.sources.torch import open_module

            return open_module(what)
    if "zarr" in sys.modules:
        import zarr

        if isinstance(what, zarr.Group):
            from modelstore.sources.zarr.source import open_group

            return open_group(what)
    if isinstance(what, (list, tuple)) and what and all(isinstance(item, (str, Path)) for item in what):
        wrong = [str(item) for item in what if Path(item).suffix != ".safetensors"]
        if wrong:
            raise ValueError(f"a list must name safetensors files only, and has {wrong[0]!r}")
        return safetensors.open_files([from_home(item) for item in what])
    raise TypeError(f"a {type(what).__module__}.{type(what).__qualname__} cannot be saved: give {_ACCEPTED}")


def _open_path(given: str | Path) -> Source:
    if address := hub_id(given):
        found = open_hub(*address, str(given))
        return _open_directory(found) if isinstance(found, Path) else found
    if "://" in str(given):
        raise UnsupportedError(f"{given} is a URL, and sources are local: fetch it first, or mount it")
    path = from_home(given)
    if path.is_dir():
        return _open_directory(cached_snapshot(path) or path)
    if not path.exists():
        raise NotFoundError(f"{path} does not exist: give {_PATHS}", object=str(path))
    if path.suffix == ".safetensors":
        return safetensors.open_files([path])
    if path.suffix == ".gguf":
        raise FormatError(f"{path} is not a GGUF file, as it does not begin like one: fetch it again", object=str(path))
    raise FormatError(f"{path} is a file of an unknown kind ({path.suffix or 'no suffix'}): give {_PATHS}")


def _open_directory(root: Path) -> Source:
    try:
        top = sorted(entry.name for entry in root.iterdir())
    except PermissionError as error:
        raise StorageError(f"cannot read {root}: {explained(error)}", object=str(root)) from error
    if ".metadata" in top:
        from modelstore.sources import dcp

        return dcp.open_directory(root)
    if any(name in top for name in zarr_names.MARKS):
        return _open_zarr(root)
    if PIPELINE in top:
        return safetensors.open_pipeline(root)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in top):
        return safetensors.open_directory(root)
    if any(name.endswith((*_PICKLED, ".bin.index.json")) for name in top):
        from modelstore.sources.pickles import source as pickled

        return pickled.open_directory(root)
    if "manifest.ocdbt" in top or _has_arrays(root, iter(range(_LOOKS))):
        return _open_zarr(root)
    found = ", ".join(top[:8]) + (", …" if len(top) > 8 else "") if top else "nothing"
    raise FormatError(f"{root} holds no checkpoint (found: {found}): give {_PATHS}", object=str(root))


def _open_zarr(root: Path) -> Source:
    try:
        from modelstore.sources.zarr import source as zarr
    except ImportError as error:
        raise UnsupportedError(f"{root} is Zarr: install zarr to read it ({error})") from None
    return zarr.open_directory(root)


def _has_arrays(root: Path, looks: Iterator[int], depth: int = 4) -> bool:
    """Whether a folder, not far below, is a Zarr array: Orbax writes one folder an array, with no group above.

    No more folders are looked at than `looks` has items, and none that may not be read.
    """
    try:
        below = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return False
    for entry in below:
        if next(looks, None) is None:
            return False
        try:
            if any((entry / name).is_file() for name in zarr_names.MARKS):
                return True
        except OSError:
            continue
        if depth and _has_arrays(entry, looks, depth - 1):
            return True
    return False


def checked_files(files: Mapping[str, str | Path | bytes]) -> dict[str, Path | bytes]:
    """Further files of a model, by path; errors as for `open_source`."""
    checked: dict[str, Path | bytes] = {}
    try:
        check_new_files(files)
    except FormatError as error:
        raise ValueError(str(error)) from None
    for name, file in files.items():
        if isinstance(file, (str, Path)):
            file = from_home(file)
            require_file(file)
        elif not isinstance(file, bytes):
            raise TypeError(f"file {name!r} must be a path or bytes, not a {type(file).__name__}")
        checked[name] = file
    return checked


class _WithFiles:
    """A source with further files; its fingerprint covers them."""

    def __init__(self, source: Source, files: Mapping[str, Path | bytes]) -> None:
        self._source = source
        self._extra = dict(files)
        source.opened.watch([file for file in files.values() if isinstance(file, Path)])

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self._source.tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._source.aliases

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        return MappingProxyType({**self._source.files, **self._extra})

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._source.metadata

    @property
    def fingerprint(self) -> str | None:
        from modelstore.sources.local.filed import fingerprint

        own = self._source.fingerprint
        return None if own is None else fingerprint(self._extra.items(), self.opened, {"": own.encode()})

    @property
    def opened(self) -> Files:
        """See `Source.opened`."""
        return self._source.opened

    @property
    def beside(self) -> frozenset[str]:
        """Tensors and files that are not the model's own."""
        beside: frozenset[str] = getattr(self._source, "beside", frozenset())
        return beside

    @property
    def remarks(self) -> tuple[str, ...]:
        """Oddities of the source itself, which are kept."""
        said: tuple[str, ...] = getattr(self._source, "remarks", ())
        return said

    @property
    def skipped_bytes(self) -> Mapping[str, int]:
        """The bytes of what is not saved, where they are known."""
        sizes: Mapping[str, int] = getattr(self._source, "skipped_bytes", {})
        return sizes

    @property
    def skipped(self) -> Mapping[str, str]:
        """The entries that are not saved: relative path, or entry, → why."""
        skipped: Mapping[str, str] = getattr(self._source, "skipped", {})
        return skipped

    def read(self, name: str, region: Region, out: Bytes) -> None:
        self._source.read(name, region, out)

    def close(self) -> None:
        self._source.close()
