"""Boxes of elements, cut out of buffers of raw bytes and put into them, bit for bit whatever the dtype."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelstore.format.buffers import Bytes
from modelstore.format.region import Region, Shape, extent, slices


def elements(buffer: Bytes, shape: Shape, itemsize: int) -> NDArray[np.void]:
    """Raw bytes as an n-d array of opaque elements, without a copy."""
    return buffer.view(f"V{itemsize}").reshape(shape)


def cut(buffer: Bytes, shape: Shape, itemsize: int, region: Region) -> Bytes:
    """A region's bytes, out of those of a tensor; a copy only if they do not follow one another."""
    box = elements(buffer, shape, itemsize)[slices(region)]
    return np.ascontiguousarray(box).reshape(-1).view(np.uint8)


def paste(part: Bytes, buffer: Bytes, shape: Shape, itemsize: int, region: Region) -> None:
    """Put a region's bytes into those of a tensor."""
    elements(buffer, shape, itemsize)[slices(region)] = elements(part, extent(region), itemsize)


def copy(
    source: Bytes, shape: Shape, region: Region, target: Bytes, target_shape: Shape, place: Region, itemsize: int
) -> None:
    """Copy a region of one tensor to a place of the same extent in another."""
    elements(target, target_shape, itemsize)[slices(place)] = elements(source, shape, itemsize)[slices(region)]
