"""State dicts and modules in memory as a source."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.errors import UnsupportedError
from modelstore.format import region as regions
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.given import told
from modelstore.format.names import check_tensor
from modelstore.format.region import Region
from modelstore.sources.arrays import copy_box, dtype_of
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.reading import Files, boxed

TensorValue = torch.Tensor | NDArray[Any]

# Elements are copied as integers of their width: copying them as numbers could change a NaN or a bool.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateDictSource:
    """Named tensors in memory, of any device, dtype and strides. They must not change until the save is done.

    Tensors with the same memory, shape, strides and dtype are tied: the first name is the tensor, the others aliases.
    Names for which `apart` has unlike things are never tied. `beside` names tensors and files that are not the model's own.
    `UnsupportedError` names a tensor without dense values here: meta, sparse, quantized, sharded, or a wrapper.
    """

    def __init__(
        self,
        state: Mapping[str, TensorValue],
        *,
        files: Mapping[str, Path | bytes] | None = None,
        apart: Mapping[str, Hashable] = MappingProxyType({}),
        beside: frozenset[str] = frozenset(),
    ) -> None:
        self.beside = beside
        self.remarks: tuple[str, ...] = ()
        self.skipped: Mapping[str, str] = {}
        self.skipped_bytes: Mapping[str, int] = {}
        self._values: dict[str, TensorValue] = {}
        self._aliases: dict[str, str] = {}
        self._tensors: list[TensorSpec] = []
        self._files = dict(files or {})
        self._opened = Files()
        self._opened.watch([file for file in self._files.values() if isinstance(file, Path)])
        first: dict[tuple[Any, ...], str] = {}
        for name, value in state.items():
            if not isinstance(name, str):
                raise TypeError(f"the state dict has {name!r} as a name, of type {type(name).__name__}: names are text")
            check_tensor(name)
            plain: TensorValue
            if isinstance(value, torch.Tensor):
                spec, plain, identity = _examine(name, value)
            elif isinstance(value, (np.ndarray, np.generic)):
                array = np.asarray(value)
                spec = TensorSpec(name, dtype_of(name, array.dtype), array.shape)
                where = array.__array_interface__["data"][0]
                plain, identity = array, ("numpy", where, array.shape, array.strides, array.dtype.str, array.dtype.name)
            else:
                raise TypeError(_refusal(name, value))
            identity = (*identity, apart.get(name))
            known = first.setdefault(identity, name) if regions.size(regions.full(spec.shape)) else name
            if known != name:
                self._aliases[name] = known
            else:
                self._values[name] = plain
                self._tensors.append(spec)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(self._tensors)

    @property
    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType(self._aliases)

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        return MappingProxyType(self._files)

    @property
    def metadata(self) -> Mapping[str, str]:
        return MappingProxyType({})

    @property
    def fingerprint(self) -> str | None:
        return None  # memory can change unseen

    @property
    def opened(self) -> Files:
        """See `Source.opened`."""
        return self._opened

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """See `Source.read`. `KeyError` for a name not in `tensors`, `ValueError` for a region outside the tensor."""
        value = self._values[name]
        regions.check(region, tuple(value.shape))
        boxed(out, region, value.itemsize)
        if not out.size:
            return
        if isinstance(value, torch.Tensor):
            _copy(value, region, out)
        else:
            copy_box(value, region, out)

    def close(self) -> None:
        self._values.clear()
        self._opened.close()


def open_state_dict(state: Mapping[str, Any], *, files: Mapping[str, Path | bytes] | None = None) -> StateDictSource:
    """Named tensors (torch or NumPy) as a source; `TypeError` naming a value that is not a tensor."""
    return StateDictSource(state, files=files)


def open_module(module: torch.nn.Module, *, files: Mapping[str, Path | bytes] | None = None) -> StateDictSource:
    """A module's parameters and persistent buffers; of a transformers model its configuration too, as files.

    Wrappers of data parallelism and `torch.compile` are looked through, so that names are the model's own.
    """
    state, configs = module_state(module)
    return StateDictSource(state, files={**configs, **(files or {})})


def module_state(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """A module's parameters and persistent buffers by the model's own names, and its configuration as files."""
    module = unwrapped(module)
    return module.state_dict(keep_vars=True), _configs(module)


def _examine(name: str, tensor: torch.Tensor) -> tuple[TensorSpec, torch.Tensor, tuple[Any, ...]]:
    tensor = _plain(name, tensor)
    found = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if found is None:
        raise UnsupportedError(
            f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored: convert it", tensor=name
        )
    flags = (tensor.is_conj(), tensor.is_neg())
    identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, flags)
    return TensorSpec(name, found, tuple(tensor.shape)), tensor, identity


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, detached, as a plain strided one; `UnsupportedError` if it does not have dense values here."""

    def refuse(what: str, advice: str) -> UnsupportedError:
        return UnsupportedError(f"tensor {name!r} is {what}: {advice}", tensor=name)

    if torch.nn.parameter.is_lazy(tensor):
        raise refuse("not initialised yet", "run the module once before saving it")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # its values are elsewhere
        if hasattr(tensor, "full_tensor") or hasattr(tensor, "local_shards"):
            raise refuse(
                f"sharded over processes ({type(tensor).__name__})",
                "save with torch.distributed.checkpoint and give its directory, or gather it first "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)",
            )
        raise refuse(f"a {type(tensor).__name__}, not a plain tensor", "convert it to one first")
    if tensor.layout != torch.strided:
        raise refuse(f"sparse ({tensor.layout})", "call .to_dense() first")
    if tensor.is_quantized:
        raise refuse("quantized by torch", "save .int_repr() and its scales, or .dequantize() it")
    if tensor.device.type == "meta":
        raise refuse("on the meta device and has no values", "load its values first")
    return tensor.detach()


def _copy(tensor: torch.Tensor, region: Region, out: Bytes) -> None:
    part = tensor[regions.slices(region)].resolve_conj().resolve_neg()
    if part.dtype == torch.complex128:
        part = torch.view_as_real(part)
    part = part.view(_INTEGERS[part.itemsize])
    torch.from_numpy(out).view(part.dtype).view(part.shape).copy_(part)


def _refusal(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        inner = next(iter(value), None)
        return (
            f"{name!r} is a mapping (its first key is {str(inner)[:80]!r}), not a tensor: give the state dict itself, or, of "
            f'a checkpoint, name it by key= or save all of it with include="all"'
        )
    return f"{name!r} is {told(value)}, not a tensor: leave it out, or make it a tensor"


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module within `torch.compile`, DataParallel and DistributedDataParallel, whose names are those of checkpoints."""
    while True:
        inner = getattr(module, "_orig_mod", None)  # torch.compile
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def _configs(module: torch.nn.Module) -> dict[str, bytes]:
    """config.json and generation_config.json as `save_pretrained` writes them, where the module has them."""
    files: dict[str, bytes] = {}
    config: Any = getattr(module, "config", None)
    if callable(getattr(config, "to_json_string", None)):
        config = copy.deepcopy(config)
        if hasattr(config, "architectures"):
            config.architectures = [type(module).__name__]
        dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
        if dtypes and getattr(config, "dtype", False) is None:
            config.dtype = dtypes[0]
        files["config.json"] = config.to_json_string().encode()
    generation: Any = getattr(module, "generation_config", None)
    if callable(getattr(generation, "to_json_string", None)):
        files["generation_config.json"] = generation.to_json_string().encode()
    return files
