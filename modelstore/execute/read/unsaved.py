"""Buffers that no checkpoint holds: tables that a module's class makes, such as those of rotary embeddings.

A module that is built on the meta device has them there, too, and loading would leave them without values. Models of
transformers make theirs again by `_init_weights`. Whether a buffer was made is seen, not believed: it is tried upon two fillings,
and what comes out of both alike does not depend on what was there before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

log = logging.getLogger("modelstore")


class UnsavedBuffer(NamedTuple):
    """A buffer of a module, by the part that it belongs to and its name there."""

    part: torch.nn.Module
    key: str
    name: str


def unsaved(module: torch.nn.Module) -> list[UnsavedBuffer]:
    """The buffers on the meta device that are not in the module's `state_dict`."""
    return [
        UnsavedBuffer(part, key, f"{prefix}.{key}" if prefix else key)
        for prefix, part in module.named_modules()
        for key in sorted(part._non_persistent_buffers_set)
        if (value := part._buffers.get(key)) is not None and value.is_meta
    ]


def made_again(module: torch.nn.Module, strict: bool) -> dict[UnsavedBuffer, torch.Tensor]:
    """Values, in host memory, of the unsaved buffers, made by the module's class. The module stays as it is.

    `ValueError` if there are others, or a warning where it is not `strict`: they would have no values.
    """
    buffers = unsaved(module)
    make = getattr(module, "_init_weights", None)
    tries = (
        [list(_tried(buffers, number, make)) for number in (0, 1)] if callable(make) else [[None] * len(buffers)] * 2
    )
    found = {
        buffer: one
        for buffer, one, other in zip(buffers, *tries, strict=True)
        if one is not None and other is not None and torch.equal(one, other)
    }
    left = [buffer.name for buffer in buffers if buffer not in found]
    if left:
        shown = f"{', '.join(left[:5])}{' …' if len(left) > 5 else ''}"
        text = f"the module's buffers {shown} are on the meta device and in no checkpoint, and its class does not make them again"
        if strict:
            raise ValueError(
                f"{text}: build them on the CPU, or give strict=False and make them afterwards; nothing was changed"
            )
        log.warning("%s: they have no values", text)
    return found


def _tried(
    buffers: list[UnsavedBuffer], number: int, make: Callable[[torch.nn.Module], object]
) -> Iterator[torch.Tensor | None]:
    """The values after `make` ran upon buffers that were all of one number; None if it cannot be run upon a part."""
    for buffer in buffers:
        part, key, _ = buffer
        if any(p is not None and not p.is_meta for p in part._parameters.values()):
            yield None  # which it would change
            continue
        held = dict(part._buffers)
        part._buffers.update(
            {
                name: torch.full(value.shape, number, dtype=value.dtype, device="cpu")
                for name, value in held.items()
                if value is not None and value.is_meta
            }
        )
        try:
            with torch.no_grad():
                make(part)
            yield part._buffers[key]
        except Exception:  # it is the module's own code
            yield None
        finally:
            part._buffers.update(held)
