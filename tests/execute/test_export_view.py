"""Files of an export that are not written: any bytes of them are those of the file that `export` writes."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelstore as ms
from modelstore.execute.export.layout import one_file
from modelstore.execute.export.share import cuts
from modelstore.execute.export.view import ExportedFile, boxes_of
from modelstore.format.region import is_contiguous, offset, size
from modelstore.plan.layout_share import Share, cut
from modelstore.plan.work import Limits
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.compress.llama import CONFIG, llama
from tests.execute.test_export import stored, weights
from tests.helpers.stores import open_on

LIMITS = Limits(64 << 20, 2)
PACKED = ("int8", "int4", "int2", "fp8", "fp8-block", "mxfp4", "nvfp4")
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("m", {}),
    "raw": ("raw", {}),
    "shards": ("m", {"max_shard_bytes": 9_000_000}),
    "one file": ("m", {"format": "safetensors"}),
    "dequantized": ("llama:int4", {"dequantize": True}),
    "w8a8": ("llama:int8", {"activations": "int8"}),
    "not stored": ("raw-llama:int4", {}),
    "gguf": ("llama", {"format": "gguf"}),
    "gguf in blocks": ("llama:int4", {"format": "gguf", "gguf_type": "Q4_0"}),
    **{preset: (f"llama:{preset}", {}) for preset in PACKED},
}


class Case:
    """An export that was written, and the same one as a view."""

    def __init__(self, store: ms.Store, out: Path, ref: str, options: dict[str, Any]) -> None:
        path = out / "m.safetensors" if options.get("format") == "safetensors" else out
        path = out / "m.gguf" if options.get("format") == "gguf" else path
        out.mkdir(exist_ok=True)
        store.export(ref, path, **options)
        self.files = store.exported(ref, **options)
        written = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        self.written = written if path == out else dict.fromkeys(self.files, next(iter(written.values())))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ms.Store:
    """Models of many dtypes, and a compressed one, in chunks that are many beside the memory."""
    store = ms.open(tmp_path_factory.mktemp("store"), memory="64MiB", threads=2)
    files = {"config.json": b'{"model_type": "toy"}', "a/b.txt": b"x" * 3_000_000, "empty.txt": b""}
    store.save("m", weights(), files=files)
    store.save("raw", weights(1), files=files, codec="raw")
    config = CONFIG | {"max_position_embeddings": 64}
    for name in ("llama", "raw-llama"):
        store.save(name, llama(), files={"config.json": json.dumps(config).encode()})
    for preset in PACKED:
        store.compress("llama", preset)
    return store


@pytest.fixture(scope="module")
def cases(store: ms.Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    out = tmp_path_factory.mktemp("out")
    return {name: Case(store, out / str(i), *LAYOUTS[name]) for i, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_those_that_are_written(cases: dict[str, Case], layout: str) -> None:
    case = cases[layout]
    assert {path: file.size for path, file in case.files.items()} == {k: len(v) for k, v in case.written.items()}
    for path, file in case.files.items():
        assert file.path == path
        assert file.read() == case.written[path]
        assert file.sha256() == hashlib.sha256(case.written[path]).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_range_is_the_slice_of_the_file(cases: dict[str, Case], layout: str, data: st.DataObject) -> None:
    case = cases[layout]
    path = data.draw(st.sampled_from(sorted(case.files)))
    n = len(case.written[path])
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, min(n, start + data.draw(st.sampled_from([9, 5000, 3 << 20])))))
    assert case.files[path].read(start, stop) == case.written[path][start:stop]


@pytest.mark.parametrize("layout", ["shards", "int4", "gguf in blocks"])
def test_many_ranges_are_the_whole_file(cases: dict[str, Case], layout: str) -> None:
    case = cases[layout]
    for path, file in case.files.items():
        step = max(1, file.size // 7 + 1)
        parts = [file.read(at, min(file.size, at + step)) for at in range(0, file.size, step)]
        assert b"".join(parts) == case.written[path]


def test_parts_of_tensors_are_written_to_the_places_that_they_name(tmp_path: Path) -> None:
    from modelstore.execute.export.files import export
    from modelstore.plan.work import Work

    reader = stored({"w": torch.randn(1200, 2500), "v": torch.randn(40, 30, 20)})
    shares = {
        "w": cut((1200, 2500), 1, [(5, 900), (1000, 1003)]),
        "v": Share((((2, 4), (0, 2)), ((1, 30),), ((3, 9),))),
    }
    export(reader, tmp_path / "a.safetensors", format="safetensors", work=Work(LIMITS), shares=shares)
    whole = (tmp_path / "a.safetensors").read_bytes()
    file = ExportedFile(reader, one_file(reader.manifest, "a", cuts(reader.manifest, shares)), LIMITS)
    assert file.read() == whole
    assert file.read(2_000_001, 2_700_003) == whole[2_000_001:2_700_003]


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 3), (0, 1 << 40)])
def test_a_range_outside_the_file_is_refused(store: ms.Store, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"do not lie within config\.json"):
        store.exported("m")["config.json"].stream(start, stop)


def test_zarr_is_no_file(store: ms.Store) -> None:
    with pytest.raises(ValueError, match="not the text 'zarr'"):
        store.exported("m", format="zarr")  # type: ignore[arg-type]


def test_a_range_of_a_large_tensor_reads_its_own_chunks() -> None:
    g = torch.Generator().manual_seed(0)
    reader = stored(
        {"w": torch.randint(0, 250, (4096, 8192), dtype=torch.uint8, generator=g).view(torch.bfloat16)}, codec="raw"
    )
    file = ExportedFile(reader, one_file(reader.manifest, "m.safetensors"), LIMITS)
    tracemalloc.start()
    found = file.read(17_000_001, 18_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 999_999
    assert reader.bytes_read <= 16 << 20, "chunks of 4 MiB, two beside each other, of one row of them or two"
    assert peak <= 16 << 20, "of 32 MiB: the range, a copy, and chunks"


def test_reading_on_reads_each_chunk_once(store: ms.Store) -> None:
    """Scales lie behind all codes in a file, and are made beside them."""
    roomy = ms.open(store.repo.storage.url, memory="512MiB", threads=2)  # a row of chunks of the widest has 16 MB
    for ref in ("m", "llama:int4"):
        file = roomy.exported(ref)["model.safetensors"]
        reader = file._reader
        before = reader.bytes_read
        for _ in file.stream():
            pass
        assert reader.bytes_read - before <= sum(reader.manifest.length.tolist())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=4), st.data())
def test_runs_cover_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    chunk = tuple(data.draw(st.integers(1, n)) for n in shape)
    tensor: Any = _Tensor(tuple(shape), chunk)
    nbytes = 2
    for n in shape:
        nbytes *= n
    start = data.draw(st.integers(0, nbytes - 1))
    stop = data.draw(st.integers(start + 1, nbytes))
    at = start
    for a, b, box in boxes_of(tensor, start, stop, data.draw(st.sampled_from([1, 8, 1000]))):
        assert a == at < b
        assert is_contiguous(box, tuple(shape))
        first = 2 * offset(box, tuple(shape))
        assert first <= a
        assert b <= first + 2 * size(box)
        assert 2 * size(box) <= 2 * (b - a + 2)
        at = b
    assert at == stop


class _Tensor:
    def __init__(self, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
        from modelstore.format.dtypes import dtype

        self.shape, self.chunk, self.kind = shape, chunk, dtype("bfloat16")


def test_a_whole_file_decodes_each_chunk_once_with_little_memory() -> None:
    """A row of chunks is larger than a step of a small budget: a part of it would decode all of its chunks again."""
    storage = CountingStorage(MemoryStorage("memory://once"))
    wide = torch.randn(4096, 8192).bfloat16()  # in chunks of half a row
    saved = open_on(storage).save("m", {"wide": wide}, codec="packed")
    file = open_on(storage, memory="64MiB")["m"].exported()["model.safetensors"]
    storage.reset()
    assert file.read()[-wide.nbytes :] == wide.view(torch.uint8).numpy().tobytes()
    assert storage.bytes["read"] <= saved.stored + 4096
