"""int4 codes as checkpoints of GPTQ and of AWQ have them: with inputs as rows, in words of eight along one side.

A weight `x.weight` (outputs, inputs) has these tensors, with n the numbers of a group of inputs:

    x.qweight  int32, from 0 to 15. GPTQ: (inputs / 8, outputs), the first input in the low bits. AWQ: (inputs, outputs / 8),
               with outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the low bits on
    x.scales   (inputs / n, outputs)
    x.qzeros   int32 (inputs / n, outputs / 8), the codes that stand for 0, packed as AWQ's codes, or in plain order. GPTQ stores
               one less, unless its `checkpoint_format` is gptq_v2
    x.g_idx    int32 (inputs), GPTQ alone, and not always: the group of each input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.compress.codes import CheckpointCodes, Given, ReadInto, group_size
from modelstore.format.buffers import Bytes
from modelstore.format.region import Region, full
from modelstore.sources.base import TensorSpec

_CODES = ".qweight"
_WORD = 8  # codes of an int32
_PLAIN, _INTERLEAVED = tuple(range(_WORD)), (0, 2, 4, 6, 1, 3, 5, 7)
_MIDDLE = 8  # the code for 0 where codes are symmetric


class RowCodes(CheckpointCodes):
    """Codes of a checkpoint of GPTQ or AWQ, symmetric ones of 4 bits; config: its `quantization_config`, where that is known."""

    def __init__(
        self,
        origin: str,
        tensors: Mapping[str, TensorSpec],
        read: ReadInto,
        config: Mapping[str, Any] | None,
    ) -> None:
        self._config = config or {}
        weights = [f"{name.removesuffix(_CODES)}.weight" for name in tensors if name.endswith(_CODES)]
        super().__init__(origin, tensors, read, weights)

    @staticmethod
    def are_in(tensors: Mapping[str, TensorSpec]) -> bool:
        """Whether a checkpoint has codes so."""
        return any(name.endswith(_CODES) for name in tensors)

    def members(self, name: str) -> tuple[str, ...]:
        parts = tuple(self._part(name, part) for part in ("qweight", "scales", "qzeros", "g_idx"))
        return tuple(part for part in parts if part in self._tensors)

    def parse(self, name: str) -> Given:
        bits = self._config.get("bits", self._config.get("w_bit", 4))
        if bits != 4:
            raise self.bad(name, f"has codes of {bits} bits")
        parts = [self._tensors.get(self._part(name, part)) for part in ("qweight", "scales", "qzeros")]
        if any(part is None or len(part.shape) != 2 for part in parts):
            raise self.bad(name, "lacks its scales or qzeros")
        codes, scales, zeros = (part for part in parts if part is not None)
        groups, outputs = scales.shape
        inputs = codes.shape[0] * (1 if self._interleaved(name) else _WORD)
        wide = (inputs, outputs // _WORD) if self._interleaved(name) else (inputs // _WORD, outputs)
        fits = codes.shape == wide and zeros.shape == (groups, outputs // _WORD) and outputs % _WORD == 0
        if not fits or {codes.dtype.name, zeros.dtype.name} != {"int32"}:
            raise self.bad(
                name, f"has codes {list(codes.shape)}, scales {list(scales.shape)}, zeros {list(zeros.shape)}"
            )
        group = group_size(inputs, groups)
        if not group or scales.dtype.name not in ("bfloat16", "float16", "float32"):
            raise self.bad(name, f"has {groups} scales of {scales.dtype.name} for {inputs} columns")
        return Given((outputs, inputs), scales.dtype.name, group)

    def check_values(self, name: str) -> None:
        groups = self._part(name, "g_idx")
        given = self.given[name]
        if groups in self._tensors:
            found = self.region(groups, full(self._tensors[groups].shape)).view("<i4")
            if not np.array_equal(found, np.arange(given.shape[1]) // given.group_size):
                raise self.bad(
                    name, "has groups in the order of activations (desc_act), which cannot be put under a ladder"
                )
        zeros = self._part(name, "qzeros")
        words = self.region(zeros, full(self._tensors[zeros].shape)).view("<u4").reshape(self._tensors[zeros].shape)
        middle = _MIDDLE - (0 if self._interleaved(name) or self._config.get("checkpoint_format") == "gptq_v2" else 1)
        if (_unpacked(words, _PLAIN) != middle).any():
            raise self.bad(name, "is asymmetric, and zero points cannot be put under a ladder")

    def is_nothing(self, name: str) -> bool:
        """Biases of zeros, which AutoGPTQ adds to layers that have none."""
        owner, _, last = name.rpartition(".")
        return last == "bias" and owner + _CODES in self._tensors and not any(band.any() for band in self._bands(name))

    def read(self, name: str, region: Region) -> tuple[NDArray[np.int8], Bytes]:
        (a, b), (c, d) = region
        scale, group = self._part(name, "scales"), self.given[name].group_size
        if self._interleaved(name):
            first, last = a // _WORD, -(-b // _WORD)
            words = self._words(name, ((c, d), (first, last)))
            codes = _unpacked(words, _INTERLEAVED)[:, a - first * _WORD : b - first * _WORD].T
        else:
            first, last = c // _WORD, -(-d // _WORD)
            words = self._words(name, ((first, last), (a, b)))
            codes = _unpacked(words.T, _PLAIN)[:, c - first * _WORD : d - first * _WORD]
        rows = (c // group, -(-d // group))
        itemsize = self._tensors[scale].dtype.itemsize
        scales = self.region(scale, (rows, (a, b))).reshape(rows[1] - rows[0], b - a, itemsize).transpose(1, 0, 2)
        return np.ascontiguousarray(codes).astype(np.int8) - np.int8(_MIDDLE), np.ascontiguousarray(scales).reshape(-1)

    def _words(self, name: str, region: Region) -> NDArray[np.uint32]:
        found = self.region(self._part(name, "qweight"), region).view("<u4")
        return found.reshape([stop - start for start, stop in region])

    def _interleaved(self, name: str) -> bool:
        """Whether words go along outputs, as AWQ's do."""
        codes, scales = (self._tensors[self._part(name, part)].shape for part in ("qweight", "scales"))
        return codes[1] != scales[1]

    @staticmethod
    def _part(name: str, part: str) -> str:
        return f"{name.removesuffix('.weight')}.{part}"


def _unpacked(words: NDArray[np.uint32], order: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 (rows, 8 * words) of words (rows, words): the codes, that of number `order[i]` in the bits from 4 * i on."""
    found = np.empty((*words.shape, _WORD), np.uint8)
    for at, number in enumerate(order):
        found[..., number] = (words >> np.uint32(4 * at)) & np.uint32(15)
    return found.reshape(words.shape[0], -1)
