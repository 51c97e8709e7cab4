"""Rotary embeddings in llama.cpp's terms.

transformers' attention factor of yarn multiplies cosines and sines. llama.cpp multiplies them by 1 + ln(factor) / 10 by
itself, and by `rope.scaling.attn_factor`, which is written if a config needs another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from modelstore.architecture.config import Config, absurd, count, flag, number, part, word
from modelstore.codecs.numeric.numbers import Floats
from modelstore.errors import UnsupportedError

_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of float32, which the file's numbers are
_BETAS = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # which frequencies yarn changes; llama.cpp has these for all architectures here


def rope(config: Config, width: int, context: int) -> tuple[dict[str, int | float | str | bool], Floats | None]:
    """Metadata of the rotary embedding, and the divisor of each frequency if llama.cpp does not have a rule for it."""
    said = {**part(config, "rope_scaling"), **part(config, "rope_parameters")}
    nested = [key for key, value in said.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedError(
            f"rotary embeddings that differ between layers ({min(nested)[:40]!r}) have no GGUF export"
        )
    base = _positive(said if said.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    for place in (said, config):
        if number(place, "partial_rotary_factor") not in (None, 1.0):
            raise UnsupportedError(
                "config.json says that a part of each head is rotated (partial_rotary_factor), which has no GGUF export"
            )
    values: dict[str, int | float | str | bool] = {".rope.freq_base": base}
    kind = word(said, "rope_type") or word(said, "type") or "default"
    if kind == "default":
        return values, None
    if kind == "linear":
        return values | {".rope.scaling.type": "linear", ".rope.scaling.factor": _positive(said, "factor")}, None
    original = count(config, "original_max_position_embeddings") or count(said, "original_max_position_embeddings")
    if (original or 1) >= 1 << 31:
        raise absurd("original_max_position_embeddings", original, "a length of text")
    if kind == "yarn":
        return values | _yarn(said, base, context, original or context), None
    if kind == "llama3":
        return values, _llama3(said, base, width, original or context)
    raise UnsupportedError(
        f"rotary embeddings of the type {kind[:80]!r} have no GGUF export: default, linear, yarn, llama3 have"
    )


def _yarn(said: Config, base: float, context: int, original: int) -> dict[str, int | float | str | bool]:
    factor = _positive(said, "factor", context / original)
    if factor < 1 or base <= 1:
        raise absurd(
            "rope_scaling", {"factor": factor, "rope_theta": base}, "a factor of yarn from 1 on, and a base above 1"
        )
    for key, default in _BETAS.items():
        if _positive(said, key, default) != default:
            raise UnsupportedError(
                f"config.json says {key} {said[key]} for yarn, and llama.cpp computes with {default:g} whatever a file says: "
                f"the model has no GGUF export"
            )
    if flag(said, "truncate") is False:
        raise UnsupportedError(
            "config.json says truncate false for yarn, and llama.cpp rounds the range of frequencies: it has no GGUF export"
        )
    scaling: dict[str, int | float | str | bool] = {
        ".rope.scaling.type": "yarn",
        ".rope.scaling.factor": factor,
        ".rope.scaling.original_context_length": original,
    }
    attention = _attention_factor(said, factor) / _mscale(factor, 1.0)
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        if not in_float32(attention):
            raise absurd("attention_factor", said.get("attention_factor"), "a factor of attention")
        scaling[".rope.scaling.attn_factor"] = attention
    return scaling


def _attention_factor(said: Config, factor: float) -> float:
    """The factor by which transformers multiplies cosines and sines."""
    if said.get("attention_factor") is not None:
        return _positive(said, "attention_factor")
    scale, scale_all = number(said, "mscale"), number(said, "mscale_all_dim")
    if not (scale and scale_all):
        return _mscale(factor, 1.0)
    return _mscale(factor, _positive(said, "mscale")) / _mscale(factor, _positive(said, "mscale_all_dim"))


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(said: Config, base: float, width: int, original: int) -> Floats:
    """By what each frequency is divided (Llama 3.1): nothing for short waves, `factor` for long ones, smoothly between."""
    factor, low, high = (_positive(said, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise absurd("high_freq_factor", high, f"more than the low_freq_factor {low}")
    factors = []
    for i in range(0, width, 2):
        wave = 2 * math.pi * base ** (i / width)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def in_float32(value: float) -> bool:
    """Whether a number that a file says in float32 is what it was, but for rounding."""
    return value == 0 or _SMALLEST < abs(value) < _LARGEST


def _positive(said: Config, key: str, default: float | None = None) -> float:
    value = number(said, key)
    if value is None:
        if default is None:
            raise UnsupportedError(f"config.json has rotary embeddings without {key!r}: the model has no GGUF export")
        return default
    if value <= 0 or not in_float32(value):
        raise absurd(key, value, "a positive number")
    return value
