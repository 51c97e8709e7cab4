"""Exports to URLs: written whole on this machine first, then sent, what makes the target complete at the end."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from modelstore.errors import ConflictError
from modelstore.format.checkpoint import ADAPTER, CONFIG, PIPELINE, Weights
from modelstore.format.results import Exported
from modelstore.storage.address import local_path
from modelstore.storage.base import Storage
from modelstore.storage.open import open_target
from modelstore.storage.remote.options import StorageOptions

_ZARR = "zarr.json"
_LAST = (CONFIG, ADAPTER, PIPELINE, _ZARR)  # at the top, without these no loader begins
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_PIECE = 8 << 20


def deliver(
    target: str | os.PathLike[str],
    options: StorageOptions | None,
    *,
    format: str,
    overwrite: bool,
    export: Callable[[Path], Exported],
) -> Exported:
    """Have `export` write to `target`: a local path, or a URL, to which its files are sent.

    Each object is whole or absent. Those without which no loader takes the others (`config.json`, an index, Zarr's metadata)
    are sent last, and where they are there already are removed first: an unfinished target is not taken for a finished one.
    It is begun anew if it was interrupted. What lies there is a `ConflictError`, unless `overwrite`.
    """
    here = local_path(target)
    if here is not None:
        if options:
            raise ValueError(f"storage_options are for URLs, and {here} is a local path: leave them out")
        return export(here)
    started = time.monotonic()
    url = os.fspath(target)
    single = format in ("safetensors", "gguf")
    place, _, name = url.rstrip("/").rpartition("/") if single else (url, "", "export")
    if single and (not name or place.endswith(":/")):
        raise ValueError(f"the URL {url!r} names no file: write it as s3://bucket/prefix/model.{format}")
    remote = _Remote(open_target(place, options), name if single else None, format == "zarr", overwrite)
    remote.check()
    with tempfile.TemporaryDirectory(prefix="modelstore-export-") as folder:
        done = export(Path(folder) / name)
        remote.send(Path(folder) if single else Path(folder) / name)
    shown = f"{remote.storage.url}/{name}" if single else remote.storage.url
    return msgspec.structs.replace(done, path=shown, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Remote:
    """Where files are sent: one of that name, or all into a folder."""

    storage: Storage
    single: str | None
    zarr: bool
    overwrite: bool

    def check(self) -> None:
        """`ConflictError` where something is in the way that may not be replaced."""
        if self.single is not None:
            there = self.single if self.storage.info(self.single) else None
        else:
            there = next((item.key for item in self.storage.list("", limit=1)), None)
        if there is not None and not self.overwrite:
            raise ConflictError(
                f"{self.storage.url} has {there!r} already; give another place, or overwrite it (--overwrite)",
                object=there,
            )
        if there is not None and self.zarr and self.storage.info(_ZARR) is None:
            raise ConflictError(
                f"{self.storage.url} is not a Zarr group: only one is overwritten; remove it", object=there
            )

    def send(self, folder: Path) -> None:
        """Send all files of a folder, in an order in which a target that is not whole is not taken for one."""
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        ordered = sorted(files, key=lambda name: (_completes(name), name))
        if self.single is None and self.overwrite:
            mine = set(ordered)
            there = sorted((item.key for item in self.storage.list("")), key=lambda key: -_completes(key))
            for key in there:
                if _completes(key) if key in mine else (self.zarr or _takes_for_weights(key, mine)):
                    self.storage.delete(key)
        for name in ordered:
            self.storage.put(name, _FilePieces(folder / name), (folder / name).stat().st_size)


def _completes(name: str) -> int:
    """How late a file is sent: what says where the others are comes after these, and the root's own at the end."""
    if name in _LAST:
        return 2
    return 1 if name.endswith((".safetensors.index.json", f"/{CONFIG}", f"/{_ZARR}")) else 0


def _takes_for_weights(key: str, mine: Iterable[str]) -> bool:
    """Whether loaders would take it for the weights that are sent, or a part of them."""
    folder = key[: key.rfind("/") + 1]
    places = [place for stem in _STEMS if (place := Weights(folder, stem)).has(key)]
    return any(place.has(name) for place in places for name in mine)


@dataclass(frozen=True)
class _FilePieces:
    """A file's bytes, as often as they are asked for: a request that failed is sent again."""

    path: Path

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
