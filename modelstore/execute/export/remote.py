"""Exports to URLs: written whole on this machine first, then sent, what makes the target complete at the end."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from modelstore.errors import ConflictError
from modelstore.execute.export.replacing import not_replaced, not_staged_zarr, refusal, zarr_there
from modelstore.format.answers.results import Exported
from modelstore.format.files import zarr_names
from modelstore.format.files.checkpoint import ADAPTER, CONFIG, PIPELINE, Weights
from modelstore.format.objects.record import FOLDERS, STORE_KEY
from modelstore.storage.address import local_path
from modelstore.storage.base import Storage
from modelstore.storage.open import open_target
from modelstore.storage.remote.options import StorageOptions

_LAST = (CONFIG, ADAPTER, PIPELINE, zarr_names.DOCUMENT)  # at the top, without these no loader starts
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
    are sent last, and where they are there already are removed first: an unfinished target is not taken for a finished one. It
    is started again if it was interrupted. An existing file there is a `ConflictError`, unless `overwrite`.
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
    _check_above(place, options)
    with tempfile.TemporaryDirectory(prefix="modelstore-export-") as folder:
        done = export(Path(folder) / name)
        remote.send(Path(folder) if single else Path(folder) / name)
    shown = f"{remote.storage.url}/{name}" if single else remote.storage.url
    remarks = remote.left(done.files)
    return msgspec.structs.replace(done, path=shown, seconds=time.monotonic() - started, remarks=remarks)


def _check_above(place: str, options: StorageOptions | None) -> None:
    """`ConflictError` if a URL is among the objects of a store above it."""
    parts = place.rstrip("/").split("/")
    for number, part in enumerate(parts):
        if number > 2 and f"{part}/" in FOLDERS:  # after the scheme and the bucket
            above = open_target("/".join(parts[:number]), options)
            if above.info(STORE_KEY) is not None:
                raise ConflictError(f"{place} belongs to the store {above.url}: give another place", object=place)


@dataclass(frozen=True)
class _Remote:
    """The target of files: one of that name, or all into a folder."""

    storage: Storage
    single: str | None
    zarr: bool
    overwrite: bool

    def check(self) -> None:
        """`ConflictError` if something is in the way that may not be replaced."""
        if self.single is not None:
            there = self.single if self.storage.info(self.single) else None
        else:
            there = next((item.key for item in self.storage.list("", limit=1)), None)
        if there is not None and not self.overwrite:
            raise ConflictError(
                f"{self.storage.url} has {there!r} already; give another place, or replace it by overwrite=True",
                object=there,
            )
        if self.storage.info(STORE_KEY) is not None:
            raise ConflictError(f"{self.storage.url} is a store: give another place", object=STORE_KEY)
        if there is None or self.single is not None:
            return
        if self.zarr and (strange := not_staged_zarr(item.key for item in self.storage.list(""))):
            raise refusal(self.storage.url, strange)
        if not self.zarr and (mark := next((one for one in zarr_names.MARKS if self.storage.info(one)), None)):
            raise zarr_there(self.storage.url, mark)

    def left(self, mine: Collection[str]) -> tuple[str, ...]:
        """The remark on objects in a folder beside the files that were sent."""
        if self.single is not None or not self.overwrite:
            return ()
        return not_replaced(self.storage.url, [item.key for item in self.storage.list("") if item.key not in mine])

    def send(self, folder: Path) -> None:
        """Send all files of a folder, in an order in which a target that is not whole is not taken for one."""
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        ordered = sorted(files, key=lambda name: (_completes(name), name))
        for inner in sorted({name.rpartition("/")[0] for name in ordered} - {""}):
            if self.storage.info(f"{inner}/{STORE_KEY}") is not None:
                raise ConflictError(f"{self.storage.url} has a store in {inner}: give another place", object=inner)
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
    return 1 if name.endswith((".safetensors.index.json", f"/{CONFIG}", f"/{zarr_names.DOCUMENT}")) else 0


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
