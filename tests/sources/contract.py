"""What every source must do, inherited by the tests of each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelstore.format import region as regions
from modelstore.format.dtypes import DTYPES
from modelstore.sources.base import Source

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(repr=False)
class Opened:
    """A source, and what it must hold: name → tensor. `ordered` is False where the format keeps no order."""

    source: Source
    expected: dict[str, torch.Tensor]
    ordered: bool = True


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes as uint8 of its shape and a last axis of the item size, through no conversion."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.complex128:
        lanes = torch.view_as_real(tensor).contiguous().view(torch.int64).numpy()
        return lanes.view(np.uint8).reshape((*tensor.shape, 16))
    integers = tensor.view(_INTEGERS[tensor.element_size()]).numpy()
    return np.frombuffer(integers.tobytes(), np.uint8).reshape((*tensor.shape, tensor.element_size()))


def bits(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of that dtype with random bits: NaN payloads, infinities, -0.0 and denormals among them."""
    kind = DTYPES[name]
    rng = np.random.default_rng([seed, *name.encode()])
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if not count:
        return torch.empty(shape, dtype=getattr(torch, name))
    flat = torch.from_numpy(rng.integers(0, 2 if name == "bool" else 256, count, dtype=np.uint8))
    if name == "complex128":
        return torch.view_as_complex(flat.view(torch.float64).reshape(*shape, 2))
    return flat.view(getattr(torch, name)).reshape(shape)


def read(source: Source, name: str, region: regions.Region | None = None) -> np.ndarray:
    """A region, read into memory that holds something else before."""
    spec = {spec.name: spec for spec in source.tensors}[name]
    region = regions.full(spec.shape) if region is None else region
    out = np.full(regions.size(region) * spec.dtype.itemsize, 0xA5, np.uint8)
    source.read(name, region, out)
    return out.reshape((*regions.extent(region), spec.dtype.itemsize))


@st.composite
def regions_of(draw: st.DrawFn, shape: tuple[int, ...]) -> regions.Region:
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((a, b) for a, b in pairs)


class SourceContract:
    """Subclasses give the fixture `opened`, of class scope."""

    def test_every_tensor_is_named_once_in_order(self, opened: Opened) -> None:
        names = [spec.name for spec in opened.source.tensors]
        assert len(names) == len(set(names))
        assert set(names) | opened.source.aliases.keys() == opened.expected.keys()
        if opened.ordered:
            assert names == [name for name in opened.expected if name not in opened.source.aliases]

    def test_aliases_lead_to_tensors(self, opened: Opened) -> None:
        names = {spec.name for spec in opened.source.tensors}
        for alias, name in opened.source.aliases.items():
            assert alias not in names
            assert name in names
            assert np.array_equal(raw(opened.expected[alias]), raw(opened.expected[name]))

    def test_dtypes_and_shapes(self, opened: Opened) -> None:
        for spec in opened.source.tensors:
            assert spec.shape == tuple(opened.expected[spec.name].shape)
            assert f"torch.{spec.dtype.name}" == str(opened.expected[spec.name].dtype)

    def test_whole_tensors_are_exact(self, opened: Opened) -> None:
        for spec in opened.source.tensors:
            assert np.array_equal(read(opened.source, spec.name), raw(opened.expected[spec.name])), spec

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_regions_are_exact(self, opened: Opened, data: st.DataObject) -> None:
        spec = data.draw(st.sampled_from(opened.source.tensors))
        region = data.draw(regions_of(spec.shape))
        wanted = raw(opened.expected[spec.name])[regions.slices(region)]
        assert np.array_equal(read(opened.source, spec.name, region), wanted)

    def test_threads_read_at_once(self, opened: Opened) -> None:
        names = [spec.name for spec in opened.source.tensors] * 8
        with ThreadPoolExecutor(8) as pool:
            for name, got in zip(names, pool.map(lambda name: read(opened.source, name), names), strict=True):
                assert np.array_equal(got, raw(opened.expected[name]))

    def test_wrong_requests_are_refused(self, opened: Opened) -> None:
        spec = next(spec for spec in opened.source.tensors if spec.shape)
        out = np.empty(1, np.uint8)
        with pytest.raises(KeyError):
            opened.source.read("no such tensor", (), out)
        with pytest.raises(ValueError, match="region"):
            opened.source.read(spec.name, tuple((0, n + 1) for n in spec.shape), out)
        with pytest.raises(ValueError, match="out has"):
            opened.source.read(spec.name, regions.full(spec.shape), np.empty(10**6 + 7, np.uint8))

    def test_the_fingerprint_is_stable(self, opened: Opened) -> None:
        assert opened.source.fingerprint == opened.source.fingerprint
