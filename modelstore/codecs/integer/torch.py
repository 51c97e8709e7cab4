"""The arithmetic of `int` in torch, bit for bit, on the device of the tensor: groups of rows, by range or best clip.

`kernels` computes group by group; here the same is computed for all groups together, operation by operation and in the same
order. Eager torch joins no multiplication with an addition, so that a CUDA device gives the bits of the CPU. It divides by a
Python number as by its reciprocal there, with other bits; so numbers to divide by are tensors here (`_divided`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, dtype

_STEPS, _PATIENCE = 21, 5
_LOG = (0.58495050, 0.96096325, -0.31974909, 0.15544586, -0.08001088)  # log2(1.5 + m), by powers of m
_EXP = (0.99992448, 0.69312103, 0.24264008, 0.05592204)  # 2 ** f


class Quantized(NamedTuple):
    """codes: int8 (rows, columns); scale: the weights' dtype (or float32), zero: int8, both (rows, groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(
    weight: Tensor, bits: int = 4, symmetric: bool = True, group_size: int = 128, method: str = "minmax"
) -> Quantized:
    """A matrix (rows, columns) of floats in groups of its columns, as `codec.Int` does by "minmax" and "mse".

    The last group may be shorter. `ValueError` for any other method, and for anything but a matrix.
    """
    import torch

    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: a matrix of floats is wanted, not {weight.dtype} of shape {tuple(weight.shape)}")
    if method not in ("minmax", "mse"):
        raise ValueError(f"method {method!r} is not known here; known are minmax and mse")
    rows, columns = weight.shape
    whole = columns // group_size * group_size
    cuts = [(0, whole, group_size), (whole, columns, columns - whole)]  # whole groups, and the shorter one at the end
    kind = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    largest = min(torch.finfo(weight.dtype).max, torch.finfo(torch.float32).max)
    found = [
        _groups(weight[:, a:b].reshape(rows, -1, width), kind, largest, bits, symmetric, method)
        for a, b, width in cuts
        if b > a
    ]
    return Quantized(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def dequantize(quantized: Quantized, group_size: int, to: dtype) -> Tensor:
    """(code - zero point) * scale in float32, rounded once."""
    import torch

    codes, scale, zero = quantized
    index = torch.arange(codes.shape[1], device=codes.device) // group_size
    difference = codes.to(torch.float32) - zero.to(torch.float32)[:, index]
    return (difference * scale.to(torch.float32)[:, index]).to(to)


def _groups(
    weight: Tensor, kind: dtype, largest: float, bits: int, symmetric: bool, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (rows, groups, width): codes (rows, groups * width), scales and zero points (rows, groups)."""
    import torch

    top = torch.finfo(torch.float32).max
    exact = weight.clamp(-top, top).where(weight.isfinite(), weight) if weight.dtype == torch.float64 else weight
    w = exact.to(torch.float32)
    w = w.where(~w.isnan(), 0.0)
    known = w.where(w.isfinite(), 0.0)
    low, high = known.amin(2).clamp(max=0), known.amax(2).clamp(min=0)
    s, z = _scale(low, high, 1.0, bits, symmetric, kind)
    if method == "mse":
        turned = (high > -low) & symmetric  # there is one more code below zero than above
        known = torch.where(turned[..., None], -known, known)
        low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
        s, z = _clip(known, low, high, s, z, bits, symmetric, kind, largest)
        s = torch.where(turned, -s, s)
    first, last = _ends(s, z, bits, largest)
    codes = (w / s[..., None] + z[..., None]).clamp(first[..., None], last[..., None]).round()
    return codes.to(torch.int8).flatten(1), s.to(kind), z.to(torch.int8)


def _scale(low: Tensor, high: Tensor, part: float, bits: int, symmetric: bool, kind: dtype) -> tuple[Tensor, Tensor]:
    """Scale, as it is stored, and zero point for `part` of a range."""
    import torch

    top, least = float((1 << bits) - 1), float(-(1 << (bits - 1)))
    low, high = low * part, high * part
    if symmetric:
        s = _stored(_divided(torch.maximum(-low, high), top / 2), kind)
    else:
        width = high - low
        halves = _divided(high * 0.5 - low * 0.5, top * 0.5)
        s = _stored(torch.where(width.isfinite(), _divided(width, top), halves), kind)
    s = s.where((low != 0) | (high != 0), 1.0)
    z = torch.zeros_like(s) if symmetric else (least - low / s).clamp(least, least + top).round()
    return s, z


def _divided(values: Tensor, by: float) -> Tensor:
    """values / by, rounded once on every device."""
    return values / values.new_tensor(by)


def _stored(s: Tensor, kind: dtype) -> Tensor:
    """Rounded to the dtype, in float16 up where it is subnormal there, and never 0."""
    import torch

    if kind == torch.float16:
        small = (s * 2.0**24).ceil().clamp(min=1) * 2.0**-24
        return torch.where(s < 2.0**-14, small, s.to(kind).to(torch.float32))
    return s.to(kind).to(torch.float32).clamp(min=2.0**-133 if kind == torch.bfloat16 else 2.0**-149)


def _ends(s: Tensor, z: Tensor, bits: int, largest: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest code that decode to finite numbers."""
    half = float(1 << (bits - 1))
    reach = (s.new_tensor(largest) / s.abs()).clamp(max=1024).floor()
    return (z - reach).clamp(min=-half), (z + reach).clamp(max=half - 1)


def _clip(
    w: Tensor,
    low: Tensor,
    high: Tensor,
    unit: Tensor,
    zero: Tensor,
    bits: int,
    symmetric: bool,
    kind: dtype,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """The one of shrinking ranges with the least loss, up to where five are no better than the best before them."""
    import torch

    best_s, best_z, least = unit, zero, _loss(w, unit, zero, unit, bits, largest)
    worse = torch.zeros_like(unit, dtype=torch.int32)
    for i in range(1, _STEPS):
        part = float(unit.new_tensor(1.0) - _divided(unit.new_tensor(float(i)), 100.0))
        s, z = _scale(low, high, part, bits, symmetric, kind)
        loss = _loss(w, s, z, unit, bits, largest)
        better = (loss < least) & (worse < _PATIENCE)
        best_s, best_z, least = (torch.where(better, a, b) for a, b in ((s, best_s), (z, best_z), (loss, least)))
        worse = torch.where(better, 0, worse + 1)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, unit, best_s), torch.where(empty, zero, best_z)


def _loss(w: Tensor, s: Tensor, z: Tensor, unit: Tensor, bits: int, largest: float) -> Tensor:
    """Sums of |error / unit| ** 2.4 over groups."""
    first, last = _ends(s, z, bits, largest)
    inverse, per = (1.0 / x.clamp(min=2.0**-126) for x in (s, unit))
    codes = (w * inverse[..., None] + z[..., None]).clamp(first[..., None], last[..., None]).round()
    error = ((codes - z[..., None]) * s[..., None] - w).abs() * per[..., None]
    return _total(_power(error, 2.4))


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent by the polynomials of `kernels`."""
    import torch

    b = x.view(torch.int32)
    m = ((b & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    t = (((b >> 23) - 127).to(torch.float32) + _polynomial(m, _LOG)) * exponent
    t = t.clamp(min=-100)
    whole = t.round()
    return ((whole.to(torch.int32) + 127) << 23).view(torch.float32) * _polynomial(t - whole, _EXP)


def _polynomial(x: Tensor, powers: tuple[float, ...]) -> Tensor:
    total = x * powers[-1] + powers[-2]
    for factor in reversed(powers[:-2]):
        total = total * x + factor
    return total


def _total(values: Tensor) -> Tensor:
    """Sums over the last dimension, by halves."""
    n = values.shape[-1]
    while n > 8:
        half = n // 2
        values[..., :half] += values[..., n - half : n]
        n -= half
    total = values[..., 0].clone()
    for i in range(1, n):
        total += values[..., i]
    return total
