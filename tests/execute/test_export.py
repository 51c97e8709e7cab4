"""Exports: the same bytes, files that other programs load, nothing half-written, whatever is killed or in the way."""

from __future__ import annotations

import json
import os
import tracemalloc
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelstore.errors import ConflictError, CorruptionError, FormatError, StorageError, UnsupportedError
from modelstore.execute.export import layout as export_layout
from modelstore.execute.export import target as export_target
from modelstore.execute.export import write as export_write
from modelstore.execute.export.files import export
from modelstore.execute.export.layout import blocks, directory
from modelstore.execute.read.fetcher import Fetcher
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.save import store
from modelstore.format import grid
from modelstore.format.files.checkpoint import Weights
from modelstore.format.names import STAGING
from modelstore.format.objects.manifest import Manifest, Plane, Tensor
from modelstore.format.region import is_contiguous, slices
from modelstore.plan.work import Limits, Work
from modelstore.sources.open import open_source
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.pool import Pool
from modelstore.store.repo import Repo

LIMITS = Limits(64 << 20, 2)
CONFIG = json.dumps({"model_type": "toy"}).encode()


def stored(source: Any, *, codec: str = "lossless", grid: str = "auto", files: Any = None) -> Reader:
    """A reader of a source that was saved."""
    storage = MemoryStorage(uuid.uuid4().hex)
    repo = Repo.on(storage)
    repo.catalog.open(create=True)
    opened = open_source(source, files=files)
    done = store(
        repo,
        "toy",
        opened,
        codec=codec,
        grid=grid,
        parent=None,
        previous=None,
        work=Work(LIMITS),
    )
    return Variant(repo, "toy", repo.manifests.entry("toy", done.entry)).reader


def with_manifest(reader: Reader, **changes: Any) -> Reader:
    """The same chunks under a manifest that was tampered with."""
    fetcher = reader._fetcher
    assert isinstance(fetcher, Fetcher)
    return Reader(Fetcher(fetcher.model, msgspec.structs.replace(fetcher.manifest, **changes), fetcher.storage), None)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes, widths in no good order, in one chunk and in many, empty and 0-d."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (1536, 4096), dtype=torch.uint8, generator=g)
    return {
        "flags": torch.tensor([True, False, True]),
        "embed": bits.view(torch.bfloat16),
        "scale": torch.randn(3, dtype=torch.float64, generator=g),
        "fp8": bits[:5, :7].clone().view(torch.float8_e4m3fn),
        "fp4": bits[:5, :7].clone().view(torch.float4_e2m1fn_x2),
        "wide": torch.randn(3, 2_000_000, generator=g),
        "conv": torch.randn(64, 32, 3, 3, generator=g).half(),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "c64": torch.randn(4, dtype=torch.complex64, generator=g),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit."""
    flat = [t.contiguous().reshape(-1) for t in (a, b)]
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.numel() or torch.equal(*(t.view(torch.uint8) for t in flat))


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same(found[name], expected[name])] == []


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, each from the file that the index names."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert sum(len(shard) for shard in shards.values()) == len(index["weight_map"])
    found = {name: shards[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


@pytest.fixture(scope="module")
def reader() -> Reader:
    return stored(weights(), files={"config.json": CONFIG, "tokenizer/vocab.txt": b"a\nb\n", "empty.txt": b""})


def everything(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, n: int) -> Callable[[], int]:
    """The n-th write of a block ends the process; how many were written."""
    count = [0]
    put = export_write._Writer.put

    def die(self: Any, block: Any, *rest: Any) -> None:
        count[0] += 1
        if count[0] == n:
            raise Killed
        put(self, block, *rest)

    monkeypatch.setattr(export_write._Writer, "put", die)
    return lambda: count[0]


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("codec", ["lossless", "raw"])
def test_every_bit_and_every_file(tmp_path: Path, codec: str) -> None:
    reader = stored(weights(), codec=codec, files={"config.json": CONFIG, "a/b.txt": b"x" * 3_000_000})
    seen: list[int] = []
    done = export(reader, tmp_path / "out", format="hf", work=Work(LIMITS, seen.append))
    check_same(load_file(tmp_path / "out/model.safetensors"), weights())
    assert (tmp_path / "out/config.json").read_bytes() == CONFIG
    assert (tmp_path / "out/a/b.txt").read_bytes() == b"x" * 3_000_000
    assert everything(tmp_path / "out") == set(done.files) == {"model.safetensors", "config.json", "a/b.txt"}
    assert done.bytes == sum((tmp_path / "out" / f).stat().st_size for f in done.files)
    assert sum(seen) == reader.manifest.nbytes


@pytest.mark.parametrize("limit", [1, 1000, 5_000_000, 30_000_000])
def test_shards_and_their_index(reader: Reader, tmp_path: Path, limit: int) -> None:
    done = export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=limit)
    check_same(load_folder(tmp_path), weights())
    assert everything(tmp_path) == set(done.files)
    for shard in tmp_path.glob("model-*.safetensors"):
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit


def test_one_file(reader: Reader, tmp_path: Path) -> None:
    export(reader, tmp_path / "deep/all.safetensors", format="safetensors", work=Work(LIMITS))
    check_same(load_file(tmp_path / "deep/all.safetensors"), weights())
    assert everything(tmp_path) == {"deep/all.safetensors"}
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        export(reader, tmp_path / "all.bin", format="safetensors", work=Work(LIMITS))


def test_metadata_is_kept(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "in.safetensors", {"format": "pt", "by": "us"})
    for source, expected in [(tmp_path / "in.safetensors", {"format": "pt", "by": "us"}), ({"a": torch.ones(2)}, None)]:
        export(stored(source), tmp_path / "x.safetensors", format="safetensors", work=Work(LIMITS), overwrite=True)
        data = (tmp_path / "x.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"] == (expected or {"format": "pt"})


def test_no_tensors_at_all(tmp_path: Path) -> None:
    reader = with_manifest(stored({"a": torch.ones(2)}), tensors=())
    export(reader, tmp_path, format="hf", work=Work(LIMITS))
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex128])
def test_a_dtype_that_safetensors_lacks_is_named_before_anything_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = stored({"fine": torch.ones(3), "odd.one": torch.ones(4, dtype=dtype)})
    for form, path in [("hf", tmp_path / "out"), ("safetensors", tmp_path / "o.safetensors")]:
        with pytest.raises(UnsupportedError, match=r"'odd\.one'.*complex") as error:
            export(reader, path, format=form, work=Work(LIMITS))  # type: ignore[arg-type]
        assert error.value.tensor == "odd.one"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what transformers makes of it


def tiny(kind: str, tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("limit", [10_000, 5_000_000_000])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("t5", True)])
def test_transformers_loads_it(tmp_path: Path, kind: str, tied: bool, limit: int) -> None:
    model = tiny(kind, tied)
    model.save_pretrained(tmp_path / "hf")
    files = {p.name: p for p in (tmp_path / "hf").glob("*.json")}
    reader = stored(model, files=files)
    assert bool(reader.manifest.aliases) == tied
    export(reader, tmp_path / "out", format="hf", work=Work(LIMITS), max_shard_bytes=limit)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_same(dict(loaded.state_dict()), dict(model.state_dict()))
    names = load_folder(tmp_path / "out").keys()
    if tied:  # as `save_pretrained` leaves them out
        assert names == load_file(tmp_path / "hf/model.safetensors").keys()
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    else:
        assert "lm_head.weight" in names


def test_tied_names_are_written_out_where_no_config_says_that_they_are_tied(tmp_path: Path) -> None:
    shared = torch.randn(32, 8)
    tensors = {"model.embed_tokens.weight": shared, "lm_head.weight": shared, "other": shared}
    for config in (None, {}, {"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": "yes"}}, []):
        files = {} if config is None else {"config.json": json.dumps(config).encode()}
        export(stored(tensors, files=files), tmp_path, format="hf", work=Work(LIMITS), overwrite=True)
        check_same(load_folder(tmp_path), tensors)
    tie = {"config.json": json.dumps({"text_config": {"tie_word_embeddings": True}}).encode()}
    reader = stored(tensors, files=tie)
    seen: list[int] = []
    export(reader, tmp_path, format="hf", work=Work(LIMITS, seen.append), overwrite=True)
    assert load_folder(tmp_path).keys() == {"model.embed_tokens.weight", "other"}  # only what is tied by rule
    assert sum(seen) == shared.nbytes
    export(reader, tmp_path / "x.safetensors", format="safetensors", work=Work(LIMITS))
    check_same(load_file(tmp_path / "x.safetensors"), tensors)


def test_the_embedding_stays_where_the_head_came_first(tmp_path: Path) -> None:
    shared = torch.randn(32, 8)
    files = {"config.json": b'{"tie_word_embeddings": true}'}
    reader = stored({"lm_head.weight": shared, "model.embed_tokens.weight": shared}, files=files)
    export(reader, tmp_path, format="hf", work=Work(LIMITS))
    check_same(load_folder(tmp_path), {"model.embed_tokens.weight": shared})


# ---------------------------------------------------------------------- memory


def test_blocks_cover_a_tensor_once_in_runs_where_they_can() -> None:
    for shape, chunk, limit in [
        ((100, 64), (13, 8), 10_000),
        ((100, 64), (13, 8), 3000),
        ((100, 64), (100, 3), 10),
        ((4, 6, 10, 9), (1, 2, 5, 4), 700),
        ((7,), (2,), 9),
        ((), (), 1),
        ((0, 5), (1, 5), 100),
        ((64, 1), (64, 1), 10),
    ]:
        tensor = Tensor("t", "float32", shape, chunk, 0, "0" * 64, (Plane("data", 0),))
        seen = np.zeros(shape, int)
        chunks = grid.count(shape, chunk)
        for region in blocks(tensor, limit):
            seen[slices(region)] += 1
            touched = len(grid.touching(shape, chunk, region))
            nbytes = seen[slices(region)].size * 4
            assert nbytes <= limit or touched == 1
            chunks -= touched
            rows = int(np.prod(shape[1:])) * chunk[0] * 4 if shape else 0
            assert is_contiguous(region, shape) or rows > limit
        assert (seen == 1).all()
        assert chunks == 0


@pytest.mark.parametrize("shape", [(26_000_000,), (5200, 5000), (8, 3_250_000), (2, 2, 6_500_000)])
def test_a_tensor_larger_than_the_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """100 MB of tensor, 64 MiB of memory; what is held stays within, in whatever way the tensor was cut."""
    values = torch.arange(np.prod(shape), dtype=torch.int32).reshape(shape)
    reader = stored({"big": values})
    tracemalloc.start()
    export(reader, tmp_path, format="hf", work=Work(LIMITS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check_same(load_folder(tmp_path), {"big": values})
    assert peak < 64 << 20


# ---------------------------------------------------------------------- interrupted


def test_it_goes_on_from_finished_shards(reader: Reader, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 9)
        with pytest.raises(Killed):
            export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    assert {p.name for p in tmp_path.iterdir()} == {STAGING}
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        written = killed_at(patch, -1)
        export(reader, tmp_path, format="hf", work=Work(LIMITS, seen.append), max_shard_bytes=1000)
    blocks_in_all = sum(
        len(list(blocks(p.tensor, 4 << 20)))
        for f in directory(reader.manifest, None, [Weights()], 1000)
        for p in f.tensors
    )
    assert blocks_in_all - 8 <= written() < blocks_in_all
    assert sum(seen) == reader.manifest.nbytes
    check_same(load_folder(tmp_path), weights())
    assert not (tmp_path / STAGING).exists()


class AtOnce(Pool):
    """Does what is submitted before it returns: whether a checkpoint is kept when the end comes is then no matter of luck."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done = super().submit(work, *args, **kwargs)
        done.exception()
        return done


@pytest.mark.parametrize("cut", [3, 12])
def test_it_goes_on_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    monkeypatch.setattr(export_write, "CHECKPOINT", 4 << 20)
    monkeypatch.setattr(export_write, "Pool", AtOnce)
    values = torch.arange(16_000_000, dtype=torch.int32).reshape(4000, 4000)
    reader = stored({"big": values})
    path = tmp_path / "model.safetensors"
    one = Limits(LIMITS.memory, threads=1)  # blocks come in order
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, cut)
        with pytest.raises(Killed):
            export(reader, tmp_path, format="hf", work=Work(one))
    assert not path.exists()
    with pytest.MonkeyPatch.context() as patch:
        written = killed_at(patch, -1)
        export(reader, tmp_path, format="hf", work=Work(one))
    assert written() < len(list(blocks(reader.manifest.tensors[0], 4 << 20)))
    check_same(load_file(path), {"big": values})
    assert everything(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("error", [CorruptionError("a chunk is damaged"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_one_file_nothing_half_written_stays(
    reader: Reader, tmp_path: Path, error: BaseException, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    if overwrite:
        path.write_bytes(b"as it was")
    before = everything(tmp_path)
    read = export_write._Writer.put
    puts: list[int] = []

    def put(*args: Any) -> None:
        read(*args)
        puts.append(1)
        if len(puts) > 2:
            raise error

    monkeypatch.setattr(export_write._Writer, "put", put)
    with pytest.raises(type(error)):
        export(reader, path, format="safetensors", work=Work(LIMITS), overwrite=overwrite)
    assert puts
    assert everything(tmp_path) == before


def test_an_export_that_found_another_one_at_work_leaves_its_file_alone(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    outputs = [export_layout.one_file(reader.manifest, path.name, None)]
    with export_target.Target(path, outputs, single=True, overwrite=False):
        with pytest.raises(ConflictError):
            export(reader, path, format="safetensors", work=Work(LIMITS))
        assert (tmp_path / ".x.safetensors.partial" / "lock").exists()


def test_killed_while_files_take_their_names(reader: Reader, tmp_path: Path) -> None:
    replace = os.replace
    for n in range(1, 20):
        out = tmp_path / str(n)
        left = [n]

        def die(source: str, target: str, left: list[int] = left, **at: int) -> None:
            left[0] -= "state" not in source
            if not left[0]:
                raise Killed
            replace(source, target, **at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", die)
            try:
                export(reader, out, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000)
                break
            except Killed:
                pass
        assert not (out / "config.json").exists()
        with pytest.raises(ConflictError):  # something else may not go on from here
            export(stored({"a": torch.ones(2)}), out, format="hf", work=Work(LIMITS))
        export(reader, out, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000)
        check_same(load_folder(out), weights())
        assert not (out / STAGING).exists()
    assert n > 5


def test_what_lies_there_of_another_export_is_not_used(reader: Reader, tmp_path: Path) -> None:
    other = stored(weights(seed=1), files={"old.txt": b"old"})
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 12)
        with pytest.raises(Killed):
            export(other, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    check_same(load_folder(tmp_path), weights())
    assert "old.txt" not in everything(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone", "header", "state"])
def test_finished_files_are_looked_at_again(reader: Reader, tmp_path: Path, damage: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 12)
        with pytest.raises(Killed):
            export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    for file in (tmp_path / STAGING / "files").glob("*.safetensors"):
        if damage == "cut":
            os.truncate(file, file.stat().st_size - 1)
        elif damage == "gone":
            file.unlink()
        elif damage == "header":
            with file.open("r+b") as opened:
                opened.seek(9)
                opened.write(b"\0")
    if damage == "state":
        (tmp_path / STAGING / "state.json").write_bytes(b'{"files": {"../x": 3}}')
    export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    check_same(load_folder(tmp_path), weights())


def planted(reader: Reader, out: Path, **state: Any) -> dict[str, Path]:
    """A hidden folder that says that all files are whole, and files with the right headers and sizes, of zeros."""
    files = {}
    done = {}
    for output in directory(reader.manifest, None, [Weights()], 9_000_000):
        path = out / STAGING / "files" / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(output.header)
        os.truncate(path, output.size)
        files[output.path] = path
        done[output.path] = {"digest": output.digest, "whole": True, "blocks": 1, "limit": 4 << 20}
    (out / STAGING / "state.json").write_text(json.dumps({"files": done, **state}))
    (out / STAGING / "lock").touch()
    return files


def test_what_was_planted_is_not_believed(reader: Reader, tmp_path: Path) -> None:
    planted(reader, tmp_path)
    export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000)
    check_same(load_folder(tmp_path), weights())
    assert (tmp_path / "tokenizer/vocab.txt").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_planted_word_that_files_have_their_names_overwrites_nothing(
    reader: Reader, tmp_path: Path, overwrite: bool
) -> None:
    outputs = directory(reader.manifest, None, [Weights()], 9_000_000)
    target = export_target.Target(tmp_path, outputs, single=False, overwrite=False)
    for name, path in planted(reader, tmp_path, placing=target._identity).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path.rename(tmp_path / name)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}
    if not overwrite:
        with pytest.raises(ConflictError, match="not empty"):
            export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000)
        assert {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")} == before
        return
    export(reader, tmp_path, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000, overwrite=True)
    check_same(load_folder(tmp_path), weights())


@pytest.mark.parametrize(
    "at", ["files", "files/tokenizer", "state.json", "state.json.new", "lock", "files/config.json"]
)
@pytest.mark.parametrize("hard", [False, True])
def test_nothing_is_touched_through_what_lies_in_the_hidden_folder(
    reader: Reader, tmp_path: Path, at: str, hard: bool
) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    for name in ("vocab.txt", "config.json", "x"):
        (outside / name).write_text("precious")
    folder = at in ("files", "files/tokenizer")
    planted(reader, out)
    link = out / STAGING / at
    if link.is_dir():
        link.rename(out / "gone")
    link.unlink(missing_ok=True)
    if hard and not folder:
        link.hardlink_to(outside / "x")
    else:
        link.symlink_to(outside if folder else outside / "x")
    try:
        export(reader, out, format="hf", work=Work(LIMITS), max_shard_bytes=9_000_000, overwrite=True)
        check_same(load_folder(out), weights())
    except StorageError as error:
        assert "which is not followed" in str(error)  # noqa: PT017  either is right
    assert {path.name: path.read_text() for path in outside.iterdir()} == dict.fromkeys(
        ("vocab.txt", "config.json", "x"), "precious"
    )


def test_a_file_that_is_swapped_after_it_was_looked_at_is_not_placed(reader: Reader, tmp_path: Path) -> None:
    sync = export_target.Target._write_state

    def swap(self: Any) -> None:
        if self._state.placing:
            file = next((tmp_path / STAGING / "files").glob("*.safetensors"))
            file.unlink()
            file.write_bytes(b"other")
        sync(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_target.Target, "_write_state", swap)
        with pytest.raises(ConflictError, match="was replaced while it was written"):
            export(reader, tmp_path, format="hf", work=Work(LIMITS))
    export(reader, tmp_path, format="hf", work=Work(LIMITS), overwrite=True)
    check_same(load_folder(tmp_path), weights())


def test_one_export_at_a_time(reader: Reader, tmp_path: Path) -> None:
    put = export_write._Writer.put
    errors: list[Exception] = []

    def again(self: Any, block: Any, *rest: Any) -> None:
        if not errors:
            try:
                export(reader, tmp_path, format="hf", work=Work(LIMITS))
            except ConflictError as error:
                errors.append(error)
        put(self, block, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_write._Writer, "put", again)
        export(reader, tmp_path, format="hf", work=Work(LIMITS))
    assert "at work" in str(errors[0])
    check_same(load_folder(tmp_path), weights())


# ---------------------------------------------------------------------- in the way


def test_what_is_there_is_kept_unless_it_may_be_overwritten(reader: Reader, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(reader, out, format="hf", work=Work(LIMITS), max_shard_bytes=1000)
    (out / "mine.txt").write_text("mine")
    (out / "config.json").write_text("old")
    before = everything(out)
    broken = Reader(Fetcher("toy", reader.manifest, MemoryStorage("empty")), None)
    broken.region = reader.region  # type: ignore[method-assign]  # the config may be read
    with pytest.raises(ConflictError, match="not empty"):
        export(broken, out, format="hf", work=Work(LIMITS))
    assert everything(out) == before
    export(reader, out, format="hf", work=Work(LIMITS), overwrite=True)
    assert everything(out) == {"model.safetensors", "config.json", "tokenizer/vocab.txt", "empty.txt", "mine.txt"}
    assert (out / "config.json").read_bytes() == CONFIG

    file = tmp_path / "f.safetensors"
    file.write_text("mine")
    with pytest.raises(ConflictError, match="there already"):
        export(reader, file, format="safetensors", work=Work(LIMITS))
    with pytest.raises(ConflictError, match="is a file"):
        export(reader, file, format="hf", work=Work(LIMITS), overwrite=True)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(ConflictError, match="is a folder"):
        export(reader, tmp_path / "d.safetensors", format="safetensors", work=Work(LIMITS), overwrite=True)
    assert file.read_text() == "mine"
    export(reader, file, format="safetensors", work=Work(LIMITS), overwrite=True)
    check_same(load_file(file), weights())


def test_an_overwrite_that_fails_leaves_the_old_as_it_was(reader: Reader, tmp_path: Path) -> None:
    export(stored(weights(1), files={"config.json": b"{}"}), tmp_path, format="hf", work=Work(LIMITS))
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 5)
        with pytest.raises(Killed):
            export(reader, tmp_path, format="hf", work=Work(LIMITS), overwrite=True)
    check_same(load_folder(tmp_path), weights(1))


def test_links_lead_nowhere(reader: Reader, tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "vocab.txt").write_text("precious")
    (outside / "model.safetensors").write_text("precious")
    out.mkdir()
    (out / "model.safetensors").symlink_to(outside / "model.safetensors")
    (out / "tokenizer").symlink_to(outside)
    with pytest.raises(ConflictError, match="tokenizer"):
        export(reader, out, format="hf", work=Work(LIMITS), overwrite=True)
    (out / "tokenizer").unlink()
    (out / STAGING).symlink_to(outside)
    with pytest.raises(ConflictError, match="is a link"):
        export(reader, out, format="hf", work=Work(LIMITS), overwrite=True)
    (out / STAGING).unlink()
    export(reader, out, format="hf", work=Work(LIMITS), overwrite=True)
    check_same(load_folder(out), weights())
    assert {p.read_text() for p in outside.iterdir()} == {"precious"}


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a\\b", "", "a//b", f"{STAGING}/state.json", "tokenizer", "C:x", "a\x00b"]
)
def test_hostile_file_names(reader: Reader, tmp_path: Path, name: str) -> None:
    manifest: Manifest = reader.manifest
    bad = msgspec.structs.replace(manifest.files[0], name=name)
    hostile = with_manifest(reader, files=(*manifest.files, bad))
    with pytest.raises(FormatError):
        export(hostile, tmp_path / "out", format="hf", work=Work(LIMITS))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "Model-00001-of-00002.safetensors"]
)
def test_a_file_never_takes_the_weights_place(reader: Reader, tmp_path: Path, name: str) -> None:
    files = tuple(f for f in reader.manifest.files if f.name == "config.json")
    bad = msgspec.structs.replace(files[0], name=name)
    export(with_manifest(reader, files=(bad, *files)), tmp_path, format="hf", work=Work(LIMITS))
    check_same(load_folder(tmp_path), weights())
    assert everything(tmp_path) == {"model.safetensors", "config.json"}


def test_a_full_disk_is_seen_beforehand(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modelstore.execute.export.target.os.statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=4096)
    )
    with pytest.raises(StorageError, match=r"needs .* bytes and its disk has 4,096,000 left"):
        export(reader, tmp_path / "out", format="hf", work=Work(LIMITS))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(reader: Reader, tmp_path: Path) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelstore.execute.export.write.os.pwrite", full)
        with pytest.raises(StorageError, match="disk is full"):
            export(reader, tmp_path, format="hf", work=Work(LIMITS))
    assert {p.name for p in tmp_path.iterdir()} == {STAGING}
    export(reader, tmp_path, format="hf", work=Work(LIMITS))
    check_same(load_folder(tmp_path), weights())
