"""The weights that a quantized checkpoint stands for: which tensors make each, and by what rule. Nothing is read here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from modelstore.architecture.config import Config, language
from modelstore.architecture.quantized import METHODS, method, quantized
from modelstore.errors import UnsupportedError
from modelstore.format.region import Shape

Scheme = Literal["fp8", "mxfp4"]
Described = Mapping[str, tuple[str, Shape]]  # name → dtype, shape

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_CODES = (*_FP8, "float8_e4m3fnuz", "float8_e5m2fnuz", "int8", "uint8")
_FLOATS = ("float32", "bfloat16", "float16")
POWERS = ("uint8", "float8_e8m0fnu")  # of two: a scale is 2^(byte - 127), 255 is not a number
_BLOCK = (128, 128)
_GROUP = 32  # numbers that share a scale in mxfp4, two in a byte
_SCALES = ("weight_scale_inv", "weight_scale")  # both are multiplied with
_BESIDE = ("input_scale", "output_scale", "input_global_scale", "activation_scale")  # of activations: no weight's
_STACK = re.compile(r"(.*)_blocks")


@dataclass(frozen=True, slots=True)
class Dequantized:
    """A weight of floats, made of `codes` and `scales`.

    "fp8": `codes` times the scale of the block of `block` rows and columns. "mxfp4": the matrices of gpt-oss, transposed, of
    which 32 numbers along a row share a power of two.
    """

    name: str
    scheme: Scheme
    codes: str
    scales: str
    dtype: str
    shape: Shape
    block: tuple[int, int] = _BLOCK


def dequantized(tensors: Described, config: Config | None) -> tuple[dict[str, Dequantized], set[str]]:
    """The weights that quantized tensors stand for, by the name of their codes, and all tensors that belong to them.

    `UnsupportedError` if one of the quantized tensors is of a method whose rule is not known here.
    """
    already = quantized({name: dtype for name, (dtype, _) in tensors.items()})
    if not already and method(config) is None:
        raise UnsupportedError("the checkpoint is not quantized, and is compressed as it is: leave out requantize")
    made = {one.codes: one for one in (*_fp8(tensors, already, config), *_mxfp4(tensors, already, config))}
    members = {name for one in made.values() for name in (one.codes, one.scales)}
    members |= {name for name in already if name.rpartition(".")[2] in _BESIDE}
    rest = sorted((already | _bytes(tensors)) - members)
    if rest or not made:
        what = f"the values of {rest[0]!r} cannot be computed here" if rest else "none of its weights is found here"
        raise UnsupportedError(
            f"the checkpoint is quantized by {method(config) or 'another tool'}, and {what}: those of float8 with scales and of "
            f"mxfp4 as gpt-oss has it can be; dequantize it with the tool that made it, and save the result",
            tensor=rest[0] if rest else None,
        )
    clash = next((one.name for one in made.values() if one.name in tensors and one.name not in members), None)
    if clash is not None:
        raise UnsupportedError(
            f"the checkpoint has {clash!r} both quantized and not: it cannot be requantized", tensor=clash
        )
    return made, members


def _bytes(tensors: Described) -> set[str]:
    """Matrices of one byte a number: codes, whatever tool and names they are of."""
    return {name for name, (dtype, shape) in tensors.items() if dtype in _CODES and len(shape) >= 2}


def plain(config: Config) -> Config:
    """The config of the model with its weights dequantized."""
    kept = {key: value for key, value in config.items() if key not in METHODS}
    return {key: plain(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _fp8(tensors: Described, already: set[str], config: Config | None) -> Iterator[Dequantized]:
    for codes in already:
        dtype, shape = tensors[codes]
        if dtype not in _FP8 or not codes.endswith("weight"):
            continue
        base = codes.removesuffix("weight")
        scales = next((base + one for one in _SCALES if base + one in tensors), None)
        if scales is None or tensors[scales][0] not in (*_FLOATS, *POWERS):
            continue
        block = _block(shape, tensors[scales][1], config)
        if block is not None:
            yield Dequantized(codes, "fp8", codes, scales, _dtype(config), shape, block)


def _block(shape: Shape, scales: Shape, config: Config | None) -> tuple[int, int] | None:
    """Rows and columns of a matrix that share one of so many scales; None if that cannot be told."""
    if len(shape) != 2 or 0 in shape:
        return None
    rows, columns = shape
    if math.prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    block = _said(config) or _BLOCK
    return block if scales == (-(-rows // block[0]), -(-columns // block[1])) else None


def _said(config: Config | None) -> tuple[int, int] | None:
    """The size of blocks that the config names."""
    for part in (config, language(config)) if config is not None else ():
        for key in METHODS:
            found = part.get(key)
            size = found.get("weight_block_size") if isinstance(found, Mapping) else None
            if isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in size):
                return size[0], size[1]
    return None


def _mxfp4(tensors: Described, already: set[str], config: Config | None) -> Iterator[Dequantized]:
    for codes in already:
        found = _STACK.fullmatch(codes)
        scales = f"{found[1]}_scales" if found else ""
        if not found or scales not in tensors:
            continue
        (kind, shape), (scale_kind, scale_shape) = tensors[codes], tensors[scales]
        if (
            (kind, scale_kind) != ("uint8", "uint8")
            or len(shape) != 4
            or shape[3] * 2 != _GROUP
            or scale_shape != shape[:3]
        ):
            continue
        experts, rows, groups, _ = shape
        yield Dequantized(found[1], "mxfp4", codes, scales, _dtype(config), (experts, groups * _GROUP, rows))


def _dtype(config: Config | None) -> str:
    """The dtype that the model computes in, as its config says."""
    for part in (config, language(config)) if config is not None else ():
        for key in ("dtype", "torch_dtype"):
            found = part.get(key)
            if isinstance(found, str) and found.removeprefix("torch.") in _FLOATS:
                return found.removeprefix("torch.")
    return "bfloat16"
