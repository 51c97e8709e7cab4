"""raw, lossless and delta: the contract, and what is theirs alone."""

from __future__ import annotations

import struct
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import zstandard

from modelstore.codecs.base import Codec
from modelstore.codecs.exact import changes
from modelstore.codecs.exact.delta import Delta
from modelstore.codecs.exact.lossless import Lossless
from modelstore.codecs.exact.raw import Raw
from modelstore.errors import FormatError
from modelstore.format.buffers import Bytes, as_bytes
from modelstore.format.dtypes import DTYPES
from modelstore.testing import contents
from modelstore.testing.codec import ExactCodecContract, room

BF16 = DTYPES["bfloat16"]
MIB = 1 << 20


def weights(size: int, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    """float32 weights like a language model's: (rows, 1024), rows and columns of log-normal scale."""
    rng = np.random.default_rng(seed)
    w = 0.02 * rng.standard_normal((size // 1024, 1024)).astype(np.float32)
    w *= np.exp(spread * rng.standard_normal((len(w), 1)).astype(np.float32))
    return w * np.exp(0.12 * rng.standard_normal(1024).astype(np.float32))


def raw_bytes(values: np.ndarray, dtype: object) -> Bytes:
    return values.astype(dtype).reshape(-1).view(np.uint8)


def size(codec: Codec, values: Bytes, dtype: str, base: Bytes | None = None) -> float:
    """Encoded bytes a raw byte."""
    d = DTYPES[dtype]
    (plane,) = codec.encode(values, (values.size // d.itemsize,), d, base)
    return as_bytes(plane).size / values.size


class TestRaw(ExactCodecContract):
    codec: ClassVar[Codec] = Raw()

    def test_copies_nothing(self) -> None:
        values = np.arange(8, dtype=np.uint8)
        (plane,) = self.codec.encode(values, (8,), DTYPES["uint8"])
        assert np.shares_memory(as_bytes(plane), values)


class TestLossless(ExactCodecContract):
    codec: ClassVar[Codec] = Lossless()

    @pytest.mark.parametrize(
        ("dtype", "made", "limit"),
        [
            ("bfloat16", ml_dtypes.bfloat16, 0.672),
            ("float16", np.float16, 0.86),
            ("float32", np.float32, 0.84),
        ],
    )
    def test_size_of_weights(self, dtype: str, made: object, limit: float) -> None:
        assert size(self.codec, raw_bytes(weights(2 * MIB), made), dtype) <= limit

    def test_float32_that_is_bfloat16(self) -> None:
        values = weights(MIB).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert size(self.codec, raw_bytes(values, np.float32), "float32") < 0.336

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_constants_vanish(self, dtype: str) -> None:
        for kind in ("zero", "constant"):
            assert size(self.codec, contents.make(kind, 4 * MIB, DTYPES[dtype], 1), dtype) < 0.001

    def test_tables_of_integers(self) -> None:
        for dtype in ("int32", "int64", "uint16"):
            assert size(self.codec, contents.make("steps", MIB, DTYPES[dtype], 0), dtype) < 0.02

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [0, 16, 1600, 1600000])
    def test_noise_grows_by_the_header_only(self, dtype: str, n: int) -> None:
        d = DTYPES[dtype]
        (plane,) = self.codec.encode(contents.make("bits", n, d, 0), (n // d.itemsize,), d)
        pieces = -(-n // (d.lane << 17)) * d.lane
        assert as_bytes(plane).size <= n + 4 + 4 * pieces

    def test_a_sudden_change_within_a_chunk(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, 2 * MIB, np.uint8)
        values = np.concatenate([np.zeros(2 * MIB, np.uint8), noise])
        assert size(self.codec, values, "bfloat16") < 0.51
        self.round_trip(values, (2 * MIB,), BF16, values)

    def test_layout_is_as_documented(self) -> None:
        """A decoder made from docs/codecs.md alone, in plain NumPy."""
        for dtype, made in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
            d = DTYPES[dtype]
            values = raw_bytes(weights(300 * 1024), made)
            (plane,) = self.codec.encode(values, (300 * 1024,), d)
            assert document(as_bytes(plane).tobytes(), d.itemsize, 300 * 1024) == values.tobytes()

    def test_bombs(self) -> None:
        def chunk(frame: bytes) -> bytes:
            return bytes([1, 0, 1, 17]) + struct.pack("<I", len(frame)) + frame

        declared = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
        big = zstandard.ZstdCompressor().compress(bytes(64 * MIB))
        unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(200))
        skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
        two = zstandard.ZstdCompressor().compress(bytes(200)) * 2
        window = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=27, format=zstandard.FORMAT_ZSTD1)
        ).compressobj(size=200)
        cut = (window.compress(bytes(200)) + window.flush())[:-2]
        for frame in (declared, big[: 200 - 1], unknown, skippable, two, cut, b""):
            memory, out = room(1, 200)
            with pytest.raises(FormatError):
                self.codec.decode([chunk(frame)], (200,), DTYPES["uint8"], out)
            assert (memory[200:] == 0xA5).all()

    def test_another_version_and_a_difference_are_refused(self) -> None:
        (plane,) = self.codec.encode(np.zeros(200, np.uint8), (200,), DTYPES["uint8"])
        good = as_bytes(plane).tobytes()
        for bad, message in ((b"\x02" + good[1:], "version 2"), (good[:1] + b"\x01" + good[2:], "base")):
            with pytest.raises(FormatError, match=message):
                self.codec.decode([bad], (200,), DTYPES["uint8"], np.zeros((1, 200), np.uint8))


def stepped(base: Bytes, share: float) -> Bytes:
    """A share of a region's 16-bit words moved by one, up or down."""
    rng = np.random.default_rng(2)
    values = base.view(np.uint16).copy()
    changed = rng.random(values.size) < share
    values[changed] += rng.choice(np.array([1, 0xFFFF], np.uint16), int(changed.sum()))
    return values.view(np.uint8)


class TestDelta(ExactCodecContract):
    codec: ClassVar[Codec] = Delta()

    def test_a_fine_tune(self) -> None:
        before = weights(2 * MIB, spread=0.0)
        base = raw_bytes(before, ml_dtypes.bfloat16)
        moved = base.view(ml_dtypes.bfloat16).astype(np.float32).reshape(before.shape)
        moved += np.random.default_rng(9).standard_normal(before.shape).astype(np.float32) * 0.02 * 0.01
        assert size(self.codec, raw_bytes(moved, ml_dtypes.bfloat16), "bfloat16", base) < 0.30

    def test_a_step_of_reinforcement_learning(self) -> None:
        base = raw_bytes(weights(2 * MIB), ml_dtypes.bfloat16)
        values = base.view(np.uint16).copy()
        changed = np.random.default_rng(1).random(values.size) < 0.01
        values[changed] += 1
        assert size(self.codec, values.view(np.uint8), "bfloat16", base) < 0.02

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.03])
    def test_small_steps_come_to_their_entropy(self, share: float) -> None:
        """Where the changed words are, and one bit each for up or down; XOR and zstd, as others do it, take twice that."""
        base = raw_bytes(weights(2 * MIB), ml_dtypes.bfloat16)
        values, bits = stepped(base, share), share * (1 - np.log2(share)) - (1 - share) * np.log2(1 - share)
        taken = size(self.codec, values, "bfloat16", base)
        assert taken <= 1.10 * bits / 16
        others = len(zstandard.ZstdCompressor(level=1).compress((values ^ base).tobytes()))
        assert taken <= 0.55 * others / values.size

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("share", [0.0, 0.0003, 0.02, 0.11])
    def test_few_words_of_any_dtype(self, dtype: str, share: float) -> None:
        """Whatever bits they are: NaN payloads, -0.0; the first and the last one; more than a group of them."""
        d = DTYPES[dtype]
        base = contents.make("bits", 600_000 * d.itemsize, d, 0)
        values = base.copy()
        lanes, rng = values.view(f"<u{d.lane}"), np.random.default_rng(1)
        changed = rng.random(lanes.size) < share
        changed[[0, -1]] = share > 0
        lanes[changed] ^= rng.integers(1, 1 << 8, int(changed.sum()), np.uint8).astype(lanes.dtype) << 8 * (d.lane - 1)
        (plane,) = self.codec.encode(values, (600_000,), d, base)
        assert as_bytes(plane)[0] == changes.VERSION
        self.round_trip(values, (600_000,), d, base)

    def test_changes_in_one_row(self) -> None:
        base = raw_bytes(weights(2 * MIB), ml_dtypes.bfloat16)
        values = base.copy()
        values[MIB : MIB + 2048] = stepped(base[MIB : MIB + 2048], 1.0)
        assert size(self.codec, values, "bfloat16", base) * values.size < 2048
        self.round_trip(values, (2048, 1024), BF16, base)

    def test_values_that_vanish_are_stored_as_values(self) -> None:
        values = np.zeros(2 * MIB, np.uint8)
        base = stepped(values, 0.1)
        assert size(self.codec, values, "bfloat16", base) < 0.001

    def test_unchanged_is_nothing(self) -> None:
        for dtype in ("bfloat16", "float32", "int8", "float8_e4m3fn"):
            values = contents.make("bits", MIB, DTYPES[dtype], 0)
            assert size(self.codec, values, dtype, values) < 0.001

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", contents.KINDS)
    def test_an_unrelated_base_costs_nothing(self, dtype: str, kind: str) -> None:
        d = DTYPES[dtype]
        values, base = contents.make(kind, MIB, d, 0), contents.make("bits", MIB, d, 1)
        alone = size(Lossless(), values, dtype)
        assert size(self.codec, values, dtype, base) <= alone * 1.01 + 0.001

    def test_a_base_is_wanted(self) -> None:
        values = np.zeros(8, np.uint8)
        (plane,) = self.codec.encode(values, (8,), DTYPES["uint8"], values)
        with pytest.raises(ValueError, match="base"):
            self.codec.encode(values, (8,), DTYPES["uint8"])
        with pytest.raises(ValueError, match="base"):
            self.codec.decode([plane], (8,), DTYPES["uint8"], np.zeros((1, 8), np.uint8))
        with pytest.raises(ValueError, match="base"):
            self.codec.encode(values, (8,), DTYPES["uint8"], values[:7])


def document(data: bytes, width: int, words: int) -> bytes:
    """Decode floats as docs/codecs.md says."""
    version, flags, planes, log = data[:4]
    assert (version, flags, planes, log) == (1, 0, width, 17)
    blocks = -(-words // 131072)
    lengths = np.frombuffer(data, "<u4", blocks * width, 4).reshape(blocks, width)
    at, out = 4 + 4 * blocks * width, []
    for b in range(blocks):
        n = min(131072, words - 131072 * b)
        pieces: dict[int, bytes] = {}
        for raw in (True, False):
            for p in range(width):
                if (lengths[b, p] == n) == raw:
                    stored = data[at : at + int(lengths[b, p])]
                    pieces[p] = stored if raw else zstandard.ZstdDecompressor().decompress(stored)
                    at += len(stored)
        w = np.zeros(n, np.uint64)
        for p in range(width):
            w = (w << np.uint64(8)) | np.frombuffer(pieces[p], np.uint8)
        top = np.uint64(0xFF << (8 * width - 8))
        below = np.uint64(1 << (8 * width - 9))
        w = (w & top) >> np.uint64(1) | (w & below) << np.uint64(8) | (w & (below - np.uint64(1)))
        out.append(w.astype(f"<u{width}").tobytes())
    assert at == len(data)
    return b"".join(out)
