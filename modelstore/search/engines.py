"""The formats that inference engines run: of those that a mix may use, the ones with kernels and a layout in an engine."""

from __future__ import annotations

from collections.abc import Sequence

from modelstore.compress.plan import weight_codec
from modelstore.format.objects.manifest import CodecSpec

ENGINES = ("transformers", "vllm", "llama.cpp")
_LLAMA_BITS, _LLAMA_GROUP = (4, 8), 32  # Q4_0 and Q8_0
_VLLM_BITS, _VLLM_GROUPS = (4, 8), (32, 64, 128)


def refuses(engine: str | None, spec: CodecSpec) -> str:
    """Why an engine does not run a format, as the end of "it …"; "" where it does, or none is named."""
    view = weight_codec(spec).view
    if view is None:
        return "is not packed for engines"
    scheme = view.scheme()
    integers, bits, group = scheme["type"] == "int", int(scheme["num_bits"]), scheme.get("group_size")
    if engine == "vllm":
        if view.format == "nvfp4-pack-quantized":
            return "has a global scale for each weight, where vllm wants one for the layers that it fuses"
        if integers and (not scheme["symmetric"] or bits not in _VLLM_BITS or group not in (None, *_VLLM_GROUPS)):
            return "is not a symmetric int of 4 or 8 bits by channel or in groups of 32, 64 or 128, which vllm runs"
    if engine == "llama.cpp" and not (
        integers and scheme["symmetric"] and bits in _LLAMA_BITS and group == _LLAMA_GROUP
    ):
        return "is not a symmetric int of 4 or 8 bits in groups of 32 (Q4_0, Q8_0), which llama.cpp runs"
    if engine == "transformers" and not scheme["symmetric"]:
        return "has zero points, which transformers takes in no packed layer"
    return ""


def runnable(engine: str | None, formats: Sequence[CodecSpec]) -> tuple[CodecSpec, ...]:
    """Those of the formats that an engine runs."""
    return tuple(spec for spec in formats if not refuses(engine, spec))
