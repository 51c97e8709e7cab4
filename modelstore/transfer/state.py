"""The state of a training, kept in the store while it runs: masters, moments, the best weights, and plain values.

A state is an object `jobs/<id>/<step>-<digest>.safetensors`, named by a digest of its bytes. The newest two are kept, so that
one that is damaged is not missed; `clear` removes all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelstore.errors import CorruptionError, FormatError, NotFoundError
from modelstore.execute.read.tensors import bytes_of, to_torch
from modelstore.format.buffers import Bytes
from modelstore.format.digest import matches, name_of_pieces
from modelstore.format.files.safetensors import PREFIX, HeaderEntry, build_header, header_length, parse_header
from modelstore.format.objects.record import JOBS
from modelstore.storage.base import Storage

_KEPT = 2
_PAGE = "training"


@dataclass(frozen=True)
class TrainingState:
    """A training's state after a step: plain values, and tensors by name."""

    step: int
    page: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class TrainingStates:
    """The states of one training, by the id of its job (32 hexadecimal digits)."""

    def __init__(self, storage: Storage, job: str) -> None:
        self._storage, self._prefix = storage, f"{JOBS}{job}/"

    def keep(self, state: TrainingState) -> None:
        """Store a state, and remove those before the one before it."""
        tensors = {name: one.detach().cpu().contiguous() for name, one in state.tensors.items()}
        entries, at = [], 0
        for name, one in tensors.items():
            entries.append(
                HeaderEntry(name, str(one.dtype).removeprefix("torch."), tuple(one.shape), at, at + one.nbytes)
            )
            at += one.nbytes
        header = build_header(entries, {_PAGE: json.dumps(state.page)})
        pieces = [np.frombuffer(header, np.uint8), *(raw for raw in map(bytes_of, tensors.values()) if raw is not None)]
        self._storage.put(
            f"{self._prefix}{state.step:08d}-{name_of_pieces(pieces)}.safetensors", pieces, sum(map(len, pieces))
        )
        for key in self._keys()[:-_KEPT]:
            self._storage.delete(key)

    def newest(self) -> TrainingState | None:
        """The newest state that is whole; None if there is none."""
        for key in reversed(self._keys()):
            try:
                return self._read(key)
            except (NotFoundError, CorruptionError, FormatError):
                continue  # the one before it is older, and the same training
        return None

    def any(self) -> bool:
        """Whether there are states."""
        return bool(self._keys())

    def clear(self) -> None:
        """Remove all states."""
        for key in self._keys():
            self._storage.delete(key)

    def _keys(self) -> list[str]:
        """The states' keys, by step."""
        return [info.key for info in self._storage.list(self._prefix)]

    def _read(self, key: str) -> TrainingState:
        info = self._storage.info(key)
        if info is None:
            raise NotFoundError(f"no object {key!r}", object=key)
        raw = np.empty(info.size, np.uint8)
        self._storage.read(key, 0, raw.data)
        if not matches(raw, bytes.fromhex(key.rpartition("-")[2].removesuffix(".safetensors"))):
            raise CorruptionError(f"object {key} is damaged: the training goes on from an earlier state", object=key)
        length = header_length(raw[:PREFIX].tobytes(), info.size)
        entries, metadata = parse_header(raw[PREFIX : PREFIX + length].tobytes(), info.size)
        page = json.loads(metadata[_PAGE])
        return TrainingState(int(page["step"]), page, dict(_tensors(entries, raw[PREFIX + length :])))


def _tensors(entries: list[HeaderEntry], data: Bytes) -> Iterator[tuple[str, torch.Tensor]]:
    for one in entries:
        yield one.name, to_torch(data[one.start : one.stop].copy(), one.dtype, one.shape)
