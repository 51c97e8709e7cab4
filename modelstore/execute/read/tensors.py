"""Between raw bytes and torch tensors; the only module of the executor that knows torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from modelstore import paths
from modelstore.errors import CorruptionError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.objects.record import pack_key
from modelstore.format.region import slices
from modelstore.plan.layout_share import Share
from modelstore.storage.base import Storage


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name; `UnsupportedError` if this torch has none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(f"dtype {name} is not known to torch {torch.__version__}: use a newer torch")
    return found


def to_torch(buffer: Bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Raw bytes as a tensor that shares their memory."""
    kind = torch_dtype(dtype)
    if not len(buffer):
        return torch.empty(tuple(shape), dtype=kind)
    return torch.from_numpy(buffer).view(kind).reshape(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> Bytes | None:
    """A host tensor's memory as bytes, None if it is not one run of them in host memory."""
    if (
        tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.is_conj()
        or tensor.is_neg()
        or not tensor.numel()
    ):
        return None
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def pinned(nbytes: int) -> Bytes:
    """A buffer in page-locked memory, for copies to a GPU that run beside other work."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


class Mapped:
    """Tensors mapped from local packs: nothing is read until it is touched, and nothing is checked.

    For tensors that are in one piece, as `save(codec="raw", grid="whole")` stores them. A write to a mapped tensor stays in
    this process.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._files: dict[int, Bytes] = {}

    def tensor(self, tensor: Tensor, share: Share) -> torch.Tensor:
        """A tensor, or a rank's share of it; `UnsupportedError` if it cannot be mapped."""
        manifest = self._manifest
        chunks = tensor.chunks
        first = tensor.planes[0].first if tensor.planes else 0
        rows = slice(first, first + chunks)
        start, length, pack = manifest.offset[rows], manifest.length[rows], manifest.pack[rows]
        in_one_piece = (
            manifest.codecs[tensor.codec].name == "raw"
            and len(tensor.planes) <= 1
            and (chunks <= 1 or ((pack[1:] == pack[:-1]).all() and (start[:-1] + length[:-1] == start[1:]).all()))
        )
        # Chunks of whole rows, one after another, are the tensor's bytes in their order.
        outer = next((i for i, c in enumerate(tensor.chunk) if c != 1), 0)
        in_order = tensor.chunk[outer + 1 :] == tensor.shape[outer + 1 :]
        if not in_one_piece or not in_order:
            raise UnsupportedError(
                f"tensor {tensor.name!r} does not lie in one piece, so it cannot be mapped: "
                f'load it without mmap, or save the model with codec="raw", grid="whole"',
                tensor=tensor.name,
            )
        if not chunks:
            return torch.empty(share.shape, dtype=torch_dtype(tensor.dtype))
        file = self._file(int(pack[0]))
        at = int(start[0])
        if at + tensor.nbytes > len(file):
            key = pack_key(manifest.packs[int(pack[0])])
            raise CorruptionError(
                f"tensor {tensor.name!r} reaches beyond the end of {key}: run 'modelstore repair'",
                tensor=tensor.name,
                object=key,
            )
        full = to_torch(file[at : at + tensor.nbytes], tensor.dtype, tensor.shape)
        if share.region is not None:
            return full if share.shape == tensor.shape else full[slices(share.region)]
        parts = [full[slices(stored)] for stored, _ in share.pieces()]
        out = torch.empty(share.shape, dtype=full.dtype)
        for part, (_, place) in zip(parts, share.pieces(), strict=True):
            out[slices(place)] = part
        return out

    def _file(self, pack: int) -> Bytes:
        if pack not in self._files:
            key = pack_key(self._manifest.packs[pack])
            path = self._storage.path(key)
            if path is None:
                raise UnsupportedError(
                    f"mmap=True needs a store on the local file system, and {self._storage.url} is none: load without it",
                    object=key,
                )
            self._files[pack] = _map(path, key)
        return self._files[pack]


def _map(path: Path, key: str) -> Bytes:
    try:
        descriptor = paths.open_file(path.parents[key.count("/")], key)  # from the store's root on, following no link
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no object {key}: run 'modelstore repair' with another copy of the store", object=key
        ) from None
    except OSError as error:
        raise StorageError(f"object {key} cannot be mapped: {error.strerror}", object=key) from error
    try:
        if not os.fstat(descriptor).st_size:  # which cannot be mapped
            return np.empty(0, np.uint8)
        area = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    return np.frombuffer(area, np.uint8)


def check_targets(
    targets: Mapping[str, torch.Tensor], tensors: Mapping[str, tuple[str, tuple[int, ...]]], strict: bool
) -> None:
    """`ValueError` naming every tensor that is missing, left over, or of another shape, before anything is read."""
    missing = sorted(targets.keys() - tensors.keys())
    extra = sorted(tensors.keys() - targets.keys())
    shapes = [
        f"{name} is {tuple(targets[name].shape)} in the module and {tensors[name][1]} in the store"
        for name in sorted(targets.keys() & tensors.keys())
        if tuple(targets[name].shape) != tensors[name][1]
    ]
    problems = [f"shape of {text}" for text in shapes]
    if strict and missing:
        problems.append(f"the store lacks {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    if strict and extra:
        problems.append(f"the module lacks {', '.join(extra[:5])}{' …' if len(extra) > 5 else ''}")
    if problems:
        raise ValueError(f"the module does not fit the model: {'; '.join(problems[:8])}; nothing was changed")
