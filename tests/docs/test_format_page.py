"""docs/format.md speaks of what the code has: every field, every dtype, every limit."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from modelstore.codecs import registry
from modelstore.format.dtypes import DTYPES
from modelstore.format.names import MAX_TENSOR_NAME, MAX_VERSION
from modelstore.format.objects import manifest, record
from modelstore.plan.chain import LONGEST_CHAIN
from modelstore.store.packs import PackNote, TensorNote

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
STRUCTS = (
    record.StoreInfo,
    record.VersionRecord,
    record.VariantEntry,
    record.TagRecord,
    manifest.Manifest,
    manifest.Tensor,
    manifest.ChunkTable,
)


def rows() -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_is_explained(struct: type[msgspec.Struct]) -> None:
    explained = {name for row in rows() for name in re.findall(r"`(\w+)`", row[0])}
    examples = set(re.findall(r'"(\w+)":', PAGE))
    missing = [name for name in struct.__struct_fields__ if name not in explained | examples]
    assert not missing


@pytest.mark.parametrize("struct", [manifest.CodecSpec, manifest.Base, PackNote, TensorNote], ids=lambda s: s.__name__)
def test_small_objects_are_shown(struct: type[msgspec.Struct]) -> None:
    assert set(struct.__struct_fields__) <= set(re.findall(r'"(\w+)":', PAGE))


def test_every_dtype_is_listed() -> None:
    cells = [cell for row in rows() for cell in row]
    listed = {}
    for name, width, other in zip(cells, cells[1:], cells[2:], strict=False):
        if name.strip("`") in DTYPES and width.isdigit():
            listed[name.strip("`")] = (int(width), None if other == "none" else other)
    assert listed == {name: (dtype.itemsize, dtype.safetensors) for name, dtype in DTYPES.items()}


def test_every_codec_is_explained() -> None:
    for name in registry.names():
        assert f"- `{name}`: " in PAGE


def test_limits_are_those_of_the_code() -> None:
    assert PAGE.startswith(f"# The format of a store\n\nFormat {manifest.FORMAT}. ")
    assert f"{MAX_VERSION:,}" in PAGE
    assert f"{MAX_TENSOR_NAME:,} bytes" in PAGE
    assert f"{manifest.MAX_DIMENSIONS} dimensions, 2^{manifest.MAX_ELEMENTS.bit_length() - 1} elements" in PAGE
    assert f"{manifest.MAX_CHUNK >> 20} MiB raw, {2 * manifest.MAX_CHUNK >> 20} MiB stored" in PAGE
    assert f"{manifest.MAX_MANIFEST >> 30} GiB" in PAGE
    assert f"| deltas in a chain | {LONGEST_CHAIN} |" in PAGE
