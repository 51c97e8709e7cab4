"""The parts of `torch.save`'s pickles: storages, tensors that are views of them, and stand-ins for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.files.safetensors import MAX_BYTES, MAX_DIMENSIONS
from modelstore.format.region import Shape
from modelstore.sources.pickles.unpickle import ClassStub, Stand, ordered_dict, reconstructed, record

_STORAGES = {
    "torch.QInt8Storage": "int8",
    "torch.QUInt8Storage": "uint8",
    "torch.QInt32Storage": "int32",
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A run of bytes in the archive, by its key; `dtype` is None for an untyped one."""

    key: str
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the archive: a strided view of a storage, in elements."""

    storage: str
    dtype: DType
    offset: int
    shape: Shape
    strides: tuple[int, ...]

    @property
    def key(self) -> str:
        """A text that is the same for the same view; tuples of numbers can be chosen to have one hash, texts cannot."""
        return f"{self.storage} {self.dtype.name} {self.offset} {self.shape} {self.strides}"


@dataclass(frozen=True, slots=True)
class NotDense:
    """A tensor that does not have a dense strided form (sparse, quantized, a subclass): named when it is met."""

    what: str


class _StorageType(ClassStub):
    """A class of storages of one dtype; None for the untyped one."""

    __slots__ = ("dtype",)

    def __init__(self, kind: str, dtype: DType | None) -> None:
        super().__init__(kind)
        self.dtype = dtype


class PickledSize(tuple[int, ...]):
    """Stands for a torch.Size."""

    __slots__ = ()


def storage_of(pid: Any) -> StorageRef:
    """The storage that a persistent id of `torch.save` names; `FormatError` if it is none."""
    if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise FormatError("the pickle refers to something that is not a storage")
    if not isinstance(pid[1], _StorageType):
        raise FormatError("the pickle has a storage of an unknown kind")
    if len(pid) == 6 and pid[5] is not None:
        raise FormatError(
            "the pickle has a view of a storage, as torch before 0.4 wrote it: save it again with a newer one"
        )
    return StorageRef(pid[2], pid[1].dtype)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS:
        raise FormatError(f"a tensor's sizes are not at most {MAX_DIMENSIONS} numbers")
    if not all(type(n) is int and 0 <= n <= MAX_BYTES for n in values):
        raise FormatError("a tensor's sizes are not whole numbers from 0 to 2**63")
    return values


def _ref(storage: Any, of: DType | None, offset: Any, shape: Any, strides: Any) -> Ref:
    shape, strides = _sizes(shape), _sizes(strides)
    (offset,) = _sizes((offset,))
    if not isinstance(storage, StorageRef) or of is None or len(shape) != len(strides):
        raise FormatError("a tensor in the pickle is not a view of a storage")
    if math.prod(n for n in shape if n) * of.itemsize > MAX_BYTES:
        raise FormatError(f"a tensor of shape {shape} is beyond 2**63 bytes")
    return Ref(storage.key, of, offset, shape, strides)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Ref | NotDense:
    if len(rest) > 2 and isinstance(rest[2], dict) and (rest[2].get("conj") or rest[2].get("neg")):
        return NotDense("a conjugated or negated view")
    return _ref(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _tensor_v1(storage: Any, offset: Any, shape: Any, strides: Any) -> Ref:
    return _ref(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, of: Any, *_: Any) -> Ref:
    return _ref(storage, of if isinstance(of, DType) else None, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(func: Any, kind: Any, args: Any, _state: Any = None) -> Any:
    """A tensor with attributes of its own, which are not kept, or of a subclass."""
    name = kind.kind if isinstance(kind, ClassStub) else "unknown class"
    if name not in _PLAIN_TENSORS:
        return NotDense(f"a {name[:200]}, not a plain tensor")
    if not callable(func) or not isinstance(args, tuple) or len(args) > 16:
        raise FormatError("a tensor in the pickle is made in an unusual way")
    return func(*args)


def _not_dense(what: str) -> Stand:
    return lambda *_: NotDense(what)


def _size(*args: Any) -> PickledSize:
    given = args[0] if args else ()
    if not isinstance(given, (tuple, list)) or len(given) > MAX_DIMENSIONS:
        raise FormatError(f"a torch.Size in the pickle is not at most {MAX_DIMENSIONS} numbers")
    return PickledSize(_sizes(tuple(given)))


def stand_ins() -> dict[str, Stand]:
    """The names in torch's own pickles that stand for plain things: dtypes, sizes, layouts."""
    allowed: dict[str, Any] = {f"torch.{name}": kind for name, kind in DTYPES.items()}
    allowed |= {
        "torch.Size": _size,
        "torch.device": record("torch.device"),
        "torch.serialization._get_layout": record("layout"),
        "collections.OrderedDict": ordered_dict,
    }
    return allowed


_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch._C.TensorBase")

ALLOWED: Mapping[str, Any] = MappingProxyType(
    stand_ins()
    | {kind: _StorageType(kind, DTYPES[of]) for kind, of in _STORAGES.items()}
    | {
        "torch.storage.UntypedStorage": _StorageType("torch.storage.UntypedStorage", None),
        "copyreg._reconstructor": reconstructed,
        "torch._utils._rebuild_tensor": _tensor_v1,
        "torch._tensor._rebuild_from_type": _of_type,
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch._utils._rebuild_wrapper_subclass": _not_dense("a tensor subclass, not a plain tensor"),
        "torch._utils._rebuild_nested_tensor": _not_dense("a nested tensor"),
        "torch._utils._rebuild_device_tensor_from_numpy": _not_dense(
            "a tensor of another kind of device, saved as NumPy's"
        ),
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_sparse_tensor": _not_dense("a sparse tensor"),
        "torch._utils._rebuild_sparse_csr_tensor": _not_dense("a sparse tensor"),
        "torch._utils._rebuild_qtensor": _not_dense("a quantized tensor"),
        "torch._utils._rebuild_meta_tensor_no_storage": _not_dense("a meta tensor, which has no values"),
        "torch.per_tensor_affine": record("torch.per_tensor_affine"),
        "torch.per_channel_affine": record("torch.per_channel_affine"),
    }
)
