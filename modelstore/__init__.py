"""modelstore: a model saved once, and any part of it read back exactly.

    import modelstore as ms

    store = ms.open("./store")
    store.save("acme/llama", "path/to/hf_dir", tag="prod")
    weights = store.load("acme/llama")

Names are looked up when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelstore import errors
    from modelstore.calibrate.text import Calibration
    from modelstore.client import Cluster, Model, Store, open
    from modelstore.codecs.spec import CodecSpec
    from modelstore.compress.presets import presets
    from modelstore.format.recipe import Recipe, Rule
    from modelstore.format.structure import Inert
    from modelstore.integrations import dcp
    from modelstore.plan.layout import ExpertParallel, Layers, PipelineStage, Regions, TensorParallel
    from modelstore.sources.slices import Slice

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Cluster",
    "CodecSpec",
    "ExpertParallel",
    "Inert",
    "Layers",
    "Model",
    "PipelineStage",
    "Recipe",
    "Regions",
    "Rule",
    "Slice",
    "Store",
    "TensorParallel",
    "__version__",
    "dcp",
    "errors",
    "open",
    "presets",
]

_MODULES = {"dcp": "modelstore.integrations.dcp", "errors": "modelstore.errors"}
_HOMES = {
    "Calibration": "modelstore.calibrate.text",
    "CodecSpec": "modelstore.codecs.spec",
    "Inert": "modelstore.format.structure",
    "Recipe": "modelstore.format.recipe",
    "Rule": "modelstore.format.recipe",
    "presets": "modelstore.compress.presets",
    "Slice": "modelstore.sources.slices",
    **dict.fromkeys(("Cluster", "Model", "Store", "open"), "modelstore.client"),
    **dict.fromkeys(
        ("ExpertParallel", "Layers", "PipelineStage", "Regions", "TensorParallel"), "modelstore.plan.layout"
    ),
}


def _imported(module: str) -> ModuleType:
    """The module, imported while no garbage is collected.

    What an import makes stays. A collection would walk all that torch made, which takes longer than the import.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if collects:
            gc.enable()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(_imported(_HOMES[name]), name)
    raise AttributeError(f"module 'modelstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
