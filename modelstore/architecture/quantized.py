"""Checkpoints that another tool has quantized already: how they say so, and which tensors belong to it."""

from __future__ import annotations

from collections.abc import Mapping

from modelstore.architecture.config import Config, language
from modelstore.format.dtypes import DTYPES

METHODS = ("quantization_config", "compression_config")
# Parts that belong together: a name with this ending, if the name with one of these endings instead is there, too.
_TOGETHER = {
    "qweight": ("scales",),  # GPTQ, AWQ
    "qzeros": ("qweight",),
    "scales": ("qweight",),
    "g_idx": ("qweight",),
    "_blocks": ("_scales",),  # gpt-oss
    "_scales": ("_blocks",),
    "_packed": ("_scale",),  # compressed-tensors
    "_scale": ("", "_packed"),  # and one scale a tensor or channel
    "_scale_2": ("",),  # ModelOpt
    "_scale_inv": ("",),  # DeepSeek
    "_zero_point": ("", "_packed"),
    "_global_scale": ("", "_packed"),
    "_shape": ("_packed",),
    "_g_idx": ("_packed",),
    ".input_scale": (".weight",),
    ".output_scale": (".weight",),
    ".activation_scale": (".weight",),
    ".input_global_scale": (".weight", ".weight_packed"),
    ".absmax": ("",),  # bitsandbytes, 4 bits
    ".quant_map": ("",),
    ".nested_absmax": ("",),
    ".nested_quant_map": ("",),
    ".quant_state.bitsandbytes__nf4": ("",),
    ".quant_state.bitsandbytes__fp4": ("",),
    ".SCB": (".weight",),  # 8 bits
    ".weight_format": (".weight",),
    "._data": ("._scale",),  # quanto
    "._scale": ("._data",),
    ".W_q": (".scale",),  # HQQ
    ".scale": (".W_q",),
    ".zero": (".W_q",),
}
_ENDS = tuple(_TOGETHER)


def method(config: Config | None) -> str | None:
    """Which method the config says the weights are quantized by; None if it speaks of none."""
    if config is None:
        return None
    for part in (config, language(config)):
        for key in METHODS:
            found = part.get(key)
            if found and not isinstance(found, Mapping):
                return "a method without a name"
            if found:
                named = found.get("quant_method") or found.get("quantization_method") or found.get("format")
                return named if isinstance(named, str) else "a method without a name"
    return None


def quantized(dtypes: Mapping[str, str]) -> set[str]:
    """The tensors that are codes, scales and the like of quantized weights, with those weights; by their names and dtypes.

    A weight that has a scale beside it is one where its numbers are of one byte: others are scaled for other reasons.
    """
    found: set[str] = set()
    for name in dtypes:
        if not name.endswith(_ENDS):
            continue
        for end, others in _TOGETHER.items():
            if not name.endswith(end):
                continue
            for beside in (name.removesuffix(end) + other for other in others):
                if beside in dtypes and (beside.endswith(_ENDS) or DTYPES[dtypes[beside]].itemsize == 1):
                    found |= {name, beside}
    return found
