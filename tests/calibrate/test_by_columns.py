"""Clips and codebooks for which each column counts by what comes through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import modelstore as ms
from modelstore.codecs.look import Look, Statistics
from modelstore.codecs.numeric.numbers import with_nan
from modelstore.codecs.registry import codec as make_codec
from modelstore.codecs.weight import WeightCodec, as_weight_codec
from modelstore.format import boxes
from modelstore.format.dtypes import DTYPES
from modelstore.format.recipe import BY_COLUMNS
from modelstore.format.region import extent, full
from tests.calibrate.killed import DATA
from tests.helpers.language import TEXT

SHAPE = (24, 96)


def values(dtype: str) -> Any:
    random = np.random.default_rng(0)
    found = random.standard_t(4, SHAPE).astype(np.float32)
    found[3, 16:32] = 0
    if dtype == "float32":
        return found.reshape(-1).view(np.uint8)
    if dtype == "float16":
        return found.astype(np.float16).reshape(-1).view(np.uint8)
    return (found.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)


def importance(spread: float) -> Any:
    found = np.exp(np.random.default_rng(1).normal(size=SHAPE[1]) * spread).astype(np.float32)
    return found / found.mean()


def weighted(codec: WeightCodec, raw: Any, shape: Any, kind: Any, heavy: Any) -> Any:
    look = Look(
        lambda region: boxes.cut(raw, shape, kind.itemsize, region), shape, kind, None, Statistics(importance=heavy)
    )
    return codec.fit(look)


def decoded(codec: Any, planes: Any, shape: Any, dtype: str) -> Any:
    kind = DTYPES[dtype]
    out = np.empty((1, shape[0] * shape[1] * kind.itemsize), np.uint8)
    codec.decode(planes, shape, kind, out)
    return with_nan(out.reshape(-1), kind).reshape(shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", BY_COLUMNS)
def test_less_is_lost_where_more_comes_through(name: str, dtype: str) -> None:
    codec, kind = as_weight_codec(make_codec(name, {})), DTYPES[dtype]
    assert codec is not None
    raw, heavy = values(dtype), importance(1.5)
    exact = with_nan(raw, kind).reshape(SHAPE)

    def lost(found: Any) -> float:
        return float((np.square(found - exact, dtype=np.float64) * heavy).sum())

    encode = weighted(codec, raw, SHAPE, kind, heavy)
    plain = decoded(codec, codec.encode(raw, SHAPE, kind), SHAPE, dtype)
    whole = decoded(codec, encode(raw, full(SHAPE)), SHAPE, dtype)
    assert lost(whole) < 0.995 * lost(plain)
    region = ((8, 16), (64, 96))
    part = encode(boxes.cut(raw, SHAPE, kind.itemsize, region), region)
    assert np.array_equal(decoded(codec, part, extent(region), dtype), whole[8:16, 64:])


@pytest.mark.parametrize("params", [{}, {"rate": 3.0}])
def test_columns_that_count_alike_give_the_codebook_of_the_weights(params: dict[str, Any]) -> None:
    codec, kind = as_weight_codec(make_codec("kmeans", params)), DTYPES["bfloat16"]
    assert codec is not None
    raw = values("bfloat16")
    alike = weighted(codec, raw, SHAPE, kind, np.ones(SHAPE[1], np.float32))(raw, full(SHAPE))
    assert [bytes(one) for one in alike] == [bytes(one) for one in codec.encode(raw, SHAPE, kind)]


def test_what_is_entropy_coded_keeps_to_its_rate() -> None:
    """However much columns count, indices are coded by how often they occur."""
    codec, kind = as_weight_codec(make_codec("kmeans", {"rate": 3.0})), DTYPES["bfloat16"]
    assert codec is not None
    raw = np.tile(values("bfloat16"), 40)
    shape = (40 * SHAPE[0], SHAPE[1])
    indices, _ = weighted(codec, raw, shape, kind, importance(2.0))(raw, full(shape))
    assert 8 * len(bytes(indices)) / (shape[0] * shape[1]) < 3.15


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_a_model_is_calibrated_so(store: ms.Store, name: str) -> None:
    params = {"levels": 8} if name == "kmeans" else {}
    rule = {"targets": ["linear"], "codec": {"name": name, "params": params}, "method": {"name": "imatrix"}}
    store.compress("m", {"name": "heavy", "rules": [rule]}, calibration=DATA)
    store.compress("m", {"name": "plain", "rules": [{**rule, "method": None}]})
    found = store.eval(["m:heavy", "m:plain"], text=TEXT, context=32)
    assert found[0].measured.kl < 1.1 * found[1].measured.kl
    heavy, plain = store.load("m:heavy"), store.load("m:plain")
    assert any(not np.array_equal(heavy[one].float(), plain[one].float()) for one in heavy)
