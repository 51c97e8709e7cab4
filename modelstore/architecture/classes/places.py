"""The places of a checkpoint's tensors in transformers, and which of them engines take packed.

Which layers a packed weight may stand for, and under which name an engine looks for them, is known to the model's own class
and to the conversions that transformers makes while it loads (renamed tensors, experts that become one parameter).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from modelstore.architecture.classes.model_class import Built, NotInstalledError, build
from modelstore.architecture.config import Config, model_type, type_told
from modelstore.codecs.weight import part_name
from modelstore.errors import UnsupportedError
from modelstore.format.region import Shape

_DENSE = "export it with dequantize=True"
_WEIGHT = ".weight"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
# Causal models whose checkpoints name each linear layer as transformers and vLLM do; known without transformers.
_PLAIN = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")


@dataclass(frozen=True, slots=True)
class Place:
    """The place that a weight of the checkpoint gets. `why`: why it is not packed there, as the end of "it …"; None if it
    can be.

    `fused`: the parameter of which it becomes one part, such as that of all experts of a layer, by a conversion that takes
    packed weights apart; None if it stays by itself. `early`: why it has to be unpacked while the model is loaded, and not
    when it runs first, as the end of "it …". `needed`: this is so if its packed layer does not have a `weight`.
    """

    module: str
    why: str | None = None
    fused: str | None = None
    early: str | None = None
    needed: bool = False


class Modules(Protocol):
    """The modules of a model, and the places of its weights in them."""

    @property
    def linears(self) -> Sequence[str]:
        """The names of all modules that engines quantize where a config says "Linear" and does not name them as ignored."""

    @property
    def early(self) -> str | None:
        """Why all weights have to be unpacked while the model is loaded, as a sentence; None if they need not."""

    @property
    def late(self) -> str | None:
        """Why weights cannot be unpacked while the model is loaded, as a sentence; None if they can."""

    def place(self, name: str, shape: Shape) -> Place:
        """The place of a weight of the checkpoint of that name and shape."""

    def called(self, name: str) -> tuple[str, ...]:
        """The names under which engines look for a module: those of the checkpoint, of the model, and of its base model."""


def modules_of(config: Config, tensors: int) -> Modules:
    """The modules of the model of so many tensors that a config.json describes. `UnsupportedError` if they are not known."""
    try:
        built = build(config, tensors)
    except NotInstalledError:
        if model_type(config) in _PLAIN:
            return _Plain()
        raise UnsupportedError(
            f"which layers of a model of {type_told(config)} engines take packed is known to transformers 5, which is "
            f"not installed: install modelstore[hub], or {_DENSE}"
        ) from None
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}, so nobody here knows which layers engines take packed: {_DENSE}") from error
    _refuse_split(built.converters.values())
    return _Built(built)


class _Plain:
    """Modules that have the names of their weights."""

    linears = ()
    early = None
    late = None

    def place(self, name: str, shape: Shape) -> Place:  # noqa: ARG002
        """As `Modules.place`."""
        return Place(name.removesuffix(_WEIGHT))

    def called(self, name: str) -> tuple[str, ...]:
        """As `Modules.called`."""
        return (name, name.removeprefix("model."))


class _Built:
    """The modules of a model of transformers."""

    def __init__(self, built: Built) -> None:
        import torch

        model = built.model
        self._model, self._rename, self._converters = model, built.rename, built.converters
        self._modules = dict(model.named_modules())
        self._tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._linears = [name for name, one in self._modules.items() if isinstance(one, torch.nn.Linear)]
        parts = (f"{name}.{part}" for name in self._linears for part in _PARTS)
        self._known = {**model.state_dict(), **dict.fromkeys(parts, True)}
        _refuse_replaced(self._modules.values())
        self.early = _cast(model, self._modules)
        self.late = _late(self._modules)
        self._float32 = _kept_in_float32(model)
        self._needed = _needed(model, self._modules, self._linears)

    @property
    def linears(self) -> Sequence[str]:
        """As `Modules.linears`."""
        return self._linears

    def place(self, name: str, shape: Shape) -> Place:
        """As `Modules.place`."""
        there, source = self._rename(name, self._known)
        module = there.removesuffix(_WEIGHT)
        if source is not None:
            return self._converted(there, source)
        owner, _, last = there.rpartition(".")
        found = self._modules.get(owner)
        if there not in self._known or found is None:
            return Place(module, f"is not a weight of {type(self._model).__name__} of transformers")
        if last != "weight" or owner not in self._linears:
            what = (
                "keeps its weights transposed, a Conv1D"
                if type(found).__name__ == "Conv1D"
                else "is not a linear layer"
            )
            return Place(module, f"{what}: {type(found).__name__} of transformers")
        if there in self._tied:
            return Place(module, "is tied to another weight")
        if tuple(self._known[there].shape) != shape:
            raise UnsupportedError(
                f"tensor {name!r} is {list(shape)} where config.json describes a model with {list(self._known[there].shape)}: "
                f"correct config.json, or {_DENSE}",
                tensor=name,
            )
        if any(self._rename(part_name(name, part), self._known)[0] != f"{owner}.{part}" for part in _PARTS):
            return Place(module, "is renamed by transformers, which does not rename its packed parts")
        wide = self._float32(f"{owner}.weight_scale") and not self._float32(there)
        early = "is unpacked to float32 where it runs, as transformers keeps its scales so" if wide else None
        return Place(module, early=early, needed=owner in self._needed)

    def _converted(self, there: str, source: str) -> Place:
        """The place of a tensor that transformers makes something else of while it loads."""
        converter = self._converters[source]
        module = there.removesuffix(_WEIGHT)
        fused = there if all(one.endswith(_WEIGHT) for one in converter.source_patterns) else None
        steps = [type(one).__name__ for one in converter.operations]
        stacked = steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        if fused and stacked and there in self._known and module not in self._linears:
            return Place(module, fused=fused)
        return Place(module, "is made into another parameter while transformers loads it", fused)

    def called(self, name: str) -> tuple[str, ...]:
        """As `Modules.called`."""
        there = self._rename(name + _WEIGHT, self._known)[0].removesuffix(_WEIGHT)
        prefix = f"{self._model.base_model_prefix}."
        return tuple(dict.fromkeys((name, there, there.removeprefix(prefix))))


def _needed(model: Any, modules: Mapping[str, Any], linears: Sequence[str]) -> set[str]:
    """The linear layers whose weight transformers initializes without asking whether it is there, as packed ones' is not."""
    weights = {name: modules[name]._parameters.pop("weight") for name in linears}
    found: set[str] = set()

    def look(name: str, module: Any, owner: Any) -> None:
        owner = module if hasattr(module, "_init_weights") else owner
        for child, below in module.named_children():
            look(f"{name}.{child}" if name else child, below, owner)
        try:
            owner._init_weights(module)
        except AttributeError:
            found.update(one for one in linears if one == name or one.startswith(f"{name}." if name else ""))

    try:
        look("", model, model)
    finally:
        for name, weight in weights.items():
            modules[name]._parameters["weight"] = weight
    return found


def _kept_in_float32(model: Any) -> Callable[[str], bool]:
    """Whether transformers keeps a tensor of that name in float32 where it loads a model in bfloat16 or float16.

    Its patterns are looked for anywhere in a name: "scale" stands for the scales of packed weights as well.
    """
    patterns = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns)) if patterns else None
    return lambda name: found is not None and found.search(name) is not None


def _cast(model: Any, modules: Mapping[str, Any]) -> str | None:
    """The buffer that a model gives another dtype while it runs: beside packed layers it keeps the one that it has."""
    for name, one in modules.items():
        for buffer in one._buffers:
            if buffer in _cast_by(type(one)):  # type: ignore[arg-type]  # classes are hashable
                return f"{type(model).__name__} of transformers casts '{name}.{buffer}' while it runs"
    return None


def _late(modules: Mapping[str, Any]) -> str | None:
    """A frozen norm: all that is called `weight` is taken for a parameter where weights are unpacked while they are loaded."""
    for name, one in modules.items():
        if "weight" in one._buffers and "weight" not in one._non_persistent_buffers_set:
            return f"transformers does not load the buffer '{name}.weight' of {type(one).__name__} then"
    return None


@cache
def _cast_by(kind: type[Any]) -> frozenset[str]:
    """The attributes that a class assigns again in its `forward`, as itself in another dtype or place; a model has many
    modules of a class.
    """
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+) = self\.\1\.to\(", source))


def _refuse_replaced(modules: Any) -> None:
    """Llama 4's experts are replaced by others when a quantized checkpoint is loaded, which its tensors do not fit."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REPLACED

    for one in modules:
        if type(one).__name__ in REPLACED:
            raise UnsupportedError(
                f"transformers replaces {type(one).__name__} where a model is quantized, and its checkpoint does not fit what "
                f"comes instead: {_DENSE}"
            )


def _refuse_split(converters: Iterable[Any]) -> None:
    """Beside packed weights transformers makes such a converter one of many sources, which may not have many targets."""
    for one in converters:
        if len(one.target_patterns) > 1 and all(source.endswith(_WEIGHT) for source in one.source_patterns):
            raise UnsupportedError(
                f"transformers makes several weights of tensors such as {one.source_patterns[0]!r} while it loads them, which it "
                f"does in checkpoints of dense weights only: {_DENSE}"
            )
