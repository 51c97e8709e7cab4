"""`int`: the contract in every granularity and method; its arithmetic by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelstore.codecs.affine import Int
from modelstore.codecs.loss import loss_of
from modelstore.codecs.numbers import numpy_dtype
from modelstore.errors import FormatError
from modelstore.format.dtypes import DTYPES
from tests.codecs.weight_contract import WeightContract, make

BF16 = DTYPES["bfloat16"]


class IntContract(WeightContract):
    idempotent = False  # the largest number of a group lies between two codes


class TestInt4(IntContract):
    codec = Int(group_size=64)


class TestInt3AffineClipped(IntContract):
    codec = Int(bits=3, symmetric=False, group_size=16, method="mse")


class TestInt4HalfQuadratic(IntContract):
    codec = Int(symmetric=False, group_size=64, method="hqq")


class TestInt2HalfQuadratic(IntContract):
    codec = Int(bits=2, group_size=16, method="hqq")
    floor = 8.0


class TestInt8Channel(IntContract):
    codec = Int(bits=8, granularity="channel")
    floor = 40.0


class TestInt4AffineChannelClipped(IntContract):
    codec = Int(symmetric=False, granularity="channel", method="mse")


class TestInt8Tensor(IntContract):
    codec = Int(bits=8, granularity="tensor")
    floor = 35.0


class TestInt8AffineTensorClipped(IntContract):
    codec = Int(bits=8, symmetric=False, granularity="tensor", method="mse")
    floor = 35.0


class TestInt4Block(IntContract):
    codec = Int(granularity="block", group_size=32, method="mse")


class TestInt8AffineBlock(IntContract):
    codec = Int(bits=8, symmetric=False, granularity="block", group_size=64)
    floor = 35.0
