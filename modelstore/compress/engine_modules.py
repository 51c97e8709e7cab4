"""Where transformers puts the tensors of a checkpoint: the model of its config.json, built without weights, and looked at.

Which layers a packed weight may stand for, and under which name an engine looks for them, is known to the model's own class
and to the conversions that transformers makes while it loads (renamed tensors, experts that become one parameter).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from modelstore.compress.engine import part_name
from modelstore.errors import UnsupportedError
from modelstore.format.region import Shape

if TYPE_CHECKING:
    import torch

_DENSE = "export it with dequantize=True"
_WEIGHT = ".weight"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
_MOST = 1 << 17  # layers, experts and the like that a config may ask for
_COUNTS = re.compile(r".*(?:layers?|blocks?|depths?|experts?|heads?|stages?|n_head|n_layer)")
_MOST_MODULES = (1 << 13, 16)  # that a model may have: so many, and so many more for each tensor
# Causal models whose checkpoints name each linear layer as transformers and vLLM do; known without transformers.
_PLAIN = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight of the checkpoint goes. `why`: why it is not packed there, as the end of "it …"; None where it can be.

    `fused`: the parameter of which it becomes one part, such as that of all experts of a layer, by a conversion that takes
    packed weights apart; None where it stays by itself. `needed`: transformers looks at the layer's `weight` before it unpacks.
    """

    module: str
    why: str | None = None
    fused: str | None = None
    needed: bool = False


class Modules(Protocol):
    """The modules of a model, and the places of its weights in them."""

    @property
    def linears(self) -> Sequence[str]:
        """The names of all modules that engines quantize where a config says "Linear" and does not name them as ignored."""

    def place(self, name: str, shape: Shape) -> Place:
        """Where a weight of the checkpoint of that name and shape goes."""

    def called(self, name: str) -> tuple[str, ...]:
        """The names under which engines look for a module: those of the checkpoint, of the model, and of its base model."""


def modules_of(config: Mapping[str, Any], tensors: int) -> Modules:
    """The modules of the model of so many tensors that a config.json describes. `UnsupportedError` where they are not known."""
    kind = config.get("model_type")
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        if kind in _PLAIN:
            return _Plain()
        raise UnsupportedError(
            f"which layers of a model of type {kind!r} engines take packed is known to transformers 5, which is not "
            f"installed: install modelstore[hub], or {_DENSE}"
        ) from None
    model = _built(transformers, config, tensors)
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    _refuse_split(converters)

    def rename(name: str, known: dict[str, Any]) -> tuple[str, str | None]:
        found = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if found[0] not in known and name in known:
            found = rename_source_key(name, [], [], model.base_model_prefix, known)
        return found

    return _Built(model, rename, {source: one for one in converters for source in one.source_patterns})


class _Plain:
    """Modules that bear the names of their weights."""

    linears = ()

    def place(self, name: str, shape: Shape) -> Place:  # noqa: ARG002
        """As `Modules.place`."""
        return Place(name.removesuffix(_WEIGHT))

    def called(self, name: str) -> tuple[str, ...]:
        """As `Modules.called`."""
        return (name, name.removeprefix("model."))


class _Built:
    """The modules of a model of transformers."""

    def __init__(
        self,
        model: Any,
        rename: Callable[[str, dict[str, Any]], tuple[str, str | None]],
        converters: Mapping[str, Any],
    ) -> None:
        import torch

        self._model, self._rename, self._converters = model, rename, converters
        self._modules = dict(model.named_modules())
        self._tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._linears = [name for name, one in self._modules.items() if isinstance(one, torch.nn.Linear)]
        parts = (f"{name}.{part}" for name in self._linears for part in _PARTS)
        self._known = {**model.state_dict(), **dict.fromkeys(parts, True)}
        _refuse_replaced(self._modules.values())
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
            return Place(module, f"is no weight of {type(self._model).__name__} of transformers")
        if last != "weight" or owner not in self._linears:
            what = (
                "keeps its weights transposed, a Conv1D" if type(found).__name__ == "Conv1D" else "is no linear layer"
            )
            return Place(module, f"{what}: {type(found).__name__} of transformers")
        if there in self._tied:
            return Place(module, "is tied to another weight")
        if tuple(self._known[there].shape) != shape:
            raise UnsupportedError(
                f"tensor {name!r} is {list(shape)} where config.json describes a model with {list(self._known[there].shape)}: "
                f"mend config.json, or {_DENSE}",
                tensor=name,
            )
        if any(self._rename(part_name(name, part), self._known)[0] != f"{owner}.{part}" for part in _PARTS):
            return Place(module, "is renamed by transformers, which does not rename its packed parts")
        return Place(module, needed=owner in self._needed)

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


def _refuse_replaced(modules: Any) -> None:
    """Llama 4's experts are replaced by others when a quantized checkpoint is loaded, which its tensors do not fit."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REPLACED

    for one in modules:
        if type(one).__name__ in REPLACED:
            raise UnsupportedError(
                f"transformers replaces {type(one).__name__} where a model is quantized, and its checkpoint does not fit what "
                f"comes instead: {_DENSE}"
            )


def _built(transformers: Any, config: Mapping[str, Any], tensors: int) -> Any:
    """The model of a config.json on torch's meta device. `UnsupportedError` where transformers cannot build it."""
    import torch

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"config.json has model type {str(kind)[:80]!r}, which transformers {transformers.__version__} does not know, and "
            f"with it which of its layers engines take packed: {_DENSE}"
        )
    _check_counts(config)
    names = config.get("architectures")
    known = transformers.models.auto.modeling_auto
    name = names[0] if isinstance(names, list) and names else known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    name = str(name or known.MODEL_MAPPING_NAMES.get(kind))[:80]
    try:
        made = getattr(transformers, name)
        if not issubclass(made, transformers.PreTrainedModel):
            raise TypeError(f"{name} is no model")
        built = transformers.CONFIG_MAPPING[kind].from_dict(_floats(config))
        with _bounded(torch, _MOST_MODULES[0] + _MOST_MODULES[1] * tensors), torch.device("meta"), torch.no_grad():
            return made(built)
    except Exception as error:
        raise UnsupportedError(
            f"transformers cannot build {name} from config.json, so that nobody here knows which of its layers engines take "
            f"packed ({type(error).__name__}: {str(error)[:200]}): {_DENSE}"
        ) from error


def _refuse_split(converters: Sequence[Any]) -> None:
    """Beside packed weights transformers makes such a converter one of many sources, which may not have many targets."""
    for one in converters:
        if len(one.target_patterns) > 1 and all(source.endswith(_WEIGHT) for source in one.source_patterns):
            raise UnsupportedError(
                f"transformers makes several weights of tensors such as {one.source_patterns[0]!r} while it loads them, which it "
                f"does in checkpoints of dense weights only: {_DENSE}"
            )


def _floats(value: Any) -> Any:
    """A config with the numbers that JSON has no word for, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _floats(one) for key, one in value.items()}
    return [_floats(one) for one in value] if isinstance(value, list) else value


def _check_counts(config: Mapping[str, Any]) -> None:
    """`UnsupportedError` for more layers or the like than any model has, which would be made one by one."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value)
        elif isinstance(value, int) and value > _MOST and _COUNTS.fullmatch(str(key)):
            raise UnsupportedError(
                f"config.json says {key} = {value}, more than {_MOST}: mend config.json, or {_DENSE}"
            )


@contextmanager
def _bounded(torch: Any, most: int) -> Iterator[None]:
    """Stop this thread where it makes more modules than that."""
    made, mine = 0, threading.get_ident()

    def count(module: torch.nn.Module, name: str, submodule: torch.nn.Module) -> None:  # noqa: ARG001
        nonlocal made
        if threading.get_ident() == mine:
            made += 1
            if made > most:
                raise ValueError(f"more than {most} modules")

    handle = torch.nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
