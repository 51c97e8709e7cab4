"""A trainer's checkpoint in memory, such as `{"model": …, "optimizer": …, "epoch": 3}`, as a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.structure import FILE as STRUCTURE
from modelstore.sources.arrays import is_tensor_dtype
from modelstore.sources.checkpoints.checkpoint import BESIDE, TensorTest, choose
from modelstore.sources.checkpoints.structure import TensorView, beside_state
from modelstore.sources.torch import StateDictSource


def _bytes(tensor: Any) -> int:
    """The bytes of a tensor's elements; 0 if it has none of its own here, as a sparse one."""
    return int(tensor.nbytes) if isinstance(tensor, np.ndarray) or _dense(tensor) else 0


def _dense(tensor: torch.Tensor) -> bool:
    lazy = torch.nn.parameter.is_lazy(tensor)
    return not (lazy or tensor.is_nested or tensor.is_quantized or tensor.is_meta) and tensor.layout == torch.strided


_TENSORS = TensorTest((torch.Tensor, np.ndarray), _bytes)


class _Live:
    """Tells tensors in memory from what else there is."""

    def view(self, value: Any, path: str) -> TensorView | None:
        if isinstance(value, np.ma.MaskedArray) or (isinstance(value, np.ndarray) and not is_tensor_dtype(value.dtype)):
            return None  # an object like any other: as a tensor its mask, or its values, would be lost
        if isinstance(value, np.ndarray):
            at = value.__array_interface__["data"][0]
            # Never tied: what is made of an array again is one of its own.
            return TensorView(f"array {id(value)} {at}", f"array {id(value)}", 0, (), value.shape, value.itemsize)
        if not isinstance(value, torch.Tensor):
            return None
        if not _dense(value):
            raise UnsupportedError(
                f"{path} is a tensor without dense values here, which is not kept: make it dense first"
            )
        # A tensor that is conjugated or negated when it is read has other values than its memory.
        memory = f"{value.device} {value.untyped_storage().data_ptr()} {value.is_conj()} {value.is_neg()}"
        offset, strides, shape = int(value.storage_offset()), value.stride(), tuple(value.shape)
        identity = f"{memory} {value.dtype} {(offset, shape, strides)}"
        return TensorView(identity, memory, offset, strides, shape, value.element_size())


def open_training(saved: Mapping[str, Any], key: str | None, *, everything: bool) -> StateDictSource:
    """The model's state dict in a mapping; with `everything` all that is beside it too.

    `TypeError` if it is not clear which dict is the model, or a value cannot be kept.
    """
    plain = saved if isinstance(saved, dict) else dict(saved)
    try:
        chosen = choose(plain, _TENSORS, "the mapping", key)
        if not everything:
            source = StateDictSource(chosen.state)
            source.skipped = dict.fromkeys(chosen.left, BESIDE)
            source.skipped_bytes = {name: left.bytes for name, left in chosen.left.items()}
            return source
        aliases = StateDictSource(chosen.state).aliases
        found = beside_state(plain, chosen, _Live(), aliases, None)
    except (FormatError, UnsupportedError) as error:
        raise TypeError(str(error)) from None
    source = StateDictSource(
        {**chosen.state, **found.tensors},
        files={STRUCTURE: found.file},
        beside=frozenset({*found.tensors, STRUCTURE}),
    )
    source.remarks = found.remarks
    return source
