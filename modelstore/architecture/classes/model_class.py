"""The model of a `config.json` as transformers builds it: on torch's meta device, without weights, within bounds.

No code runs but that of transformers itself, and nothing is fetched. Importing transformers takes seconds, so it happens here
only, when it is asked for.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelstore.architecture.config import Config, architectures, model_type, type_told
from modelstore.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Rename = Callable[[str, dict[str, Any]], tuple[str, str | None]]

_MOST = 1 << 17  # layers, experts, labels and the like that a config may ask for
_MOST_TOGETHER = 1 << 20  # of the numbers in a list of such, one for each stage or layer
_LARGEST = 1 << 40  # of any whole number in a config
_COUNTS = re.compile(r".*(?:layers?|blocks?|depths?|experts?|heads?|stages?|labels?|n_head|n_layer|attention_types)")
_MOST_MODULES = (1 << 13, 16)  # that a model may have: so many, and so many more for each tensor
_NOT_FOLLOWED = ("auto_map", "use_kernels", "use_pretrained_backbone")  # what fetches code, kernels or weights


class NotInstalledError(UnsupportedError):
    """transformers is not installed, so that only tables can tell what a model is."""


@dataclass(frozen=True, slots=True)
class Built:
    """A model without weights, and how transformers renames and converts a checkpoint's tensors while it loads them.

    `rename(name, known)`: the parameter that a stored tensor goes to, and the source pattern of the converter that makes it of
    several tensors, None if the tensor is the parameter. `converters`: by source pattern. `by`: what built it.
    """

    model: Any
    rename: Rename
    converters: Mapping[str, Any]
    by: str


def build(config: Config, tensors: int) -> Built:
    """The model of so many tensors that a `config.json` describes.

    `NotInstalledError` without transformers, `UnsupportedError` if transformers does not know the model, or cannot build it.
    """
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        raise NotInstalledError(
            f"what a model of {type_told(config)} is made of is known to transformers 5, which is not installed"
        ) from None
    with _quiet(transformers):
        model = _model(transformers, config, tensors)
        conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]

    def rename(name: str, known: dict[str, Any]) -> tuple[str, str | None]:
        found = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if found[0] not in known and name in known:
            found = rename_source_key(name, [], [], model.base_model_prefix, known)
        return found

    sources = {source: one for one in converters for source in one.source_patterns}
    return Built(model, rename, sources, f"transformers {transformers.__version__}")


def is_imported(config: Config) -> bool:
    """Whether this process has imported the classes of such models, so that one is built in little time."""
    if "torch" not in sys.modules or (transformers := sys.modules.get("transformers")) is None:
        return False
    kind = model_type(config)
    known = getattr(transformers, "CONFIG_MAPPING", None)
    try:
        module = known[kind].__module__ if known is not None and kind in known else ""
    except Exception:  # whatever a half-imported package does
        return False
    return bool(module) and module.replace(".configuration_", ".modeling_") in sys.modules


def _model(transformers: Any, config: Config, tensors: int) -> Any:
    """The model on torch's meta device. `UnsupportedError` if transformers cannot build it."""
    import torch

    kind = model_type(config)
    if kind not in transformers.CONFIG_MAPPING:
        unknown = f", which transformers {transformers.__version__} does not know" if kind else ""
        raise UnsupportedError(f"config.json has {type_told(config)}{unknown}")
    _check_counts(config)
    known = transformers.models.auto.modeling_auto
    names = [*architectures(config)[:1], *(m.get(kind) for m in _mappings(known))]
    name = str(next((one for one in names if one), None))[:80]
    try:
        made = getattr(transformers, name)
        if not issubclass(made, transformers.PreTrainedModel):
            raise TypeError(f"{name} is not a model")
        built = transformers.CONFIG_MAPPING[kind].from_dict(_plain(config))
        with _bounded(torch, _MOST_MODULES[0] + _MOST_MODULES[1] * tensors), torch.device("meta"), torch.no_grad():
            model = made(built)
        if not hasattr(model, "all_tied_weights_keys"):  # what others inherit from, such as LlamaPreTrainedModel
            raise TypeError(f"{name} is not a whole model")
        return model
    except Exception as error:
        raise UnsupportedError(
            f"transformers cannot build {name} from config.json ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _mappings(known: Any) -> Sequence[Mapping[str, Any]]:
    return known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_MAPPING_NAMES


def _plain(value: Any) -> Any:
    """A config without the entries that choose kernels or fetch, and with the numbers that JSON has no word for.

    transformers writes those as {"__float__": "Infinity"}.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {
            key: _plain(one)
            for key, one in value.items()
            if key not in _NOT_FOLLOWED and not str(key).endswith(("_implementation", "_internal"))
        }
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _check_counts(config: Mapping[str, Any]) -> None:
    """`UnsupportedError` for more layers or the like than any model has, which would be made one by one."""
    for key, value in config.items():
        counted = _COUNTS.fullmatch(str(key)) is not None
        numbers = _numbers(value)
        for number in numbers:
            _check_most(key, number, _MOST if counted else _LARGEST)
        if counted:
            _check_most(key, sum(numbers), _MOST_TOGETHER)


def _numbers(value: Any) -> list[int]:
    """The whole numbers of an entry that is one, or a list, however nested; objects in it are checked by themselves."""
    if isinstance(value, Mapping):
        _check_counts(value)
        return []
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _check_most(key: str, number: int, most: int) -> None:
    if number > most:
        raise UnsupportedError(
            f"config.json says {str(key)[:80]} = {str(number)[:80]}, more than {most} (correct config.json)"
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


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' warnings of configs; its level is as before afterwards."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
