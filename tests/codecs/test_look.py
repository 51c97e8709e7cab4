"""What a codec is given to look at: it keeps the memory that it is told, and stores what statistics say."""

from __future__ import annotations

import numpy as np
import pytest

from modelstore.codecs.floating.fp4 import Nvfp4
from modelstore.codecs.floating.fp8 import Fp8
from modelstore.codecs.integer.codec import Int
from modelstore.codecs.look import Look, Statistics
from modelstore.codecs.lowrank.codec import LowRank
from modelstore.codecs.shared.deep import Deep
from modelstore.codecs.shared.kmeans import KMeans
from modelstore.codecs.sparse.codec import Sparse, within
from modelstore.codecs.weight import WeightCodec
from modelstore.format import boxes
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.region import Region, full
from modelstore.testing.weight_codec import make

F32 = DTYPES["float32"]
SHAPE = (64, 512)
VALUES = make("normal", SHAPE, F32)


def read_back(codec: WeightCodec, statistics: Statistics) -> np.ndarray:
    look = within(VALUES, SHAPE, F32)
    planes = codec.fit(Look(look.read, SHAPE, F32, statistics=statistics))(VALUES, full(SHAPE))
    out = np.empty((1, VALUES.size), np.uint8)
    codec.decode(planes, SHAPE, F32, out)
    return out.view(np.float32).reshape(SHAPE)


@pytest.mark.parametrize(
    "codec", [KMeans(), Deep(), Sparse(sparsity=0.5), Fp8(), Nvfp4()], ids=lambda codec: codec.name
)
def test_less_is_read_at_once_where_less_may_be_held(codec: WeightCodec) -> None:
    shape = (512, 1024)
    values = make("normal", shape, F32)
    read: list[int] = []

    def reading(region: Region) -> Bytes:
        found = boxes.cut(values, shape, F32.itemsize, region)
        read.append(found.size)
        return found

    most = []
    for memory in (None, 512 << 10):
        codec.fit(Look(reading, shape, F32, memory))
        most.append(max(read))
        read.clear()
    assert most == [2 << 20, 128 << 10]


def test_the_importance_of_columns_moves_the_scales_of_integers() -> None:
    codec = Int(bits=2, group_size=64, method="mse")
    values = VALUES.view(np.float32).reshape(SHAPE)
    weighed = np.where(np.arange(SHAPE[1]) % 64 < 4, 1e4, 1e-4).astype(np.float32)
    plain, found = (read_back(codec, one) for one in (Statistics(), Statistics(importance=weighed)))
    assert ((found - values) ** 2 * weighed).sum() < 0.8 * ((plain - values) ** 2 * weighed).sum()


def test_what_is_known_of_a_tensor_is_what_is_stored() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, SHAPE).astype(np.int8)
    scales = np.random.default_rng(1).random((64, 4), np.float32)
    codec = Int(bits=4, group_size=128)
    known = Statistics(codes=lambda bits, group: Int(bits=bits, group_size=group).codes_in(codes, scales, F32))
    assert np.array_equal(read_back(codec, known), codes * scales.repeat(128, 1))
    left = VALUES.view(np.float32).reshape(SHAPE).copy()
    left[:, ::3] = 0
    kept = within(left.reshape(-1).view(np.uint8), SHAPE, F32).read
    assert np.array_equal(read_back(Sparse(sparsity=0.5), Statistics(kept=lambda: kept)), left)
    pair = np.ones((64, 2), np.float32), np.arange(1024, dtype=np.float32).reshape(2, 512)
    assert np.array_equal(read_back(LowRank(rank=2), Statistics(factors=lambda *_: pair)), pair[0] @ pair[1])
