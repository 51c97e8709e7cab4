from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.dtypes import DTYPES
from modelstore.sources.dcp import DcpSource
from modelstore.sources.open import open_source
from tests.sources.contract import Opened, SourceContract, bits, read

pytestmark = pytest.mark.filterwarnings("ignore")

# Two ranks, tensors cut by rows, by columns, unevenly, and replicated.
_WRITE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import distributed, multiprocessing
from torch.distributed import checkpoint
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

def rank(index, root, sharded):
    distributed.init_process_group("gloo", init_method=f"file://{root}.rendezvous", rank=index, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.load(f"{root}.pt", weights_only=True)
    cut = {"rows": Shard(0), "columns": Shard(1), "uneven": Shard(0), "small": Shard(0), "everywhere": Replicate()}
    state = {name: distribute_tensor(whole[name], mesh, [cut[name]]) for name in whole}
    writer = checkpoint.HuggingFaceStorageWriter(path=root, save_distributed=True) if sharded else None
    checkpoint.save(state, checkpoint_id=root, storage_writer=writer)
    distributed.destroy_process_group()

if __name__ == "__main__":
    multiprocessing.start_processes(rank, args=(sys.argv[1], sys.argv[2] == "huggingface"), nprocs=2, start_method="fork")
"""


def whole() -> dict[str, torch.Tensor]:
    return {
        "rows": bits("float32", 16, 12),
        "columns": bits("bfloat16", 8, 10),
        "uneven": bits("float32", 7, 3),
        "small": bits("float32", 1, 3),
        "everywhere": bits("float64", 5),
    }


def write_by_two(root: Path, format: str) -> dict[str, torch.Tensor]:
    torch.save(whole(), f"{root}.pt")
    script = root.parent / "write.py"
    script.write_text(_WRITE)
    subprocess.run([sys.executable, str(script), str(root), format], check=True, timeout=120)
    return whole()


class TestOneProcess(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("dcp")
        base = bits("bfloat16", 6, 8)
        tensors = {f"of.{name}": bits(name, 4, 3) for name in DTYPES if name not in ("float4_e2m1fn_x2",)}
        tensors |= {
            "turned": base.t(),
            "scalar": bits("float32"),
            "empty": bits("float32", 0, 3),
            "part": base[1:3, 2:5],
        }
        state = {"model": tensors, "step": 3, "optimizer": [torch.ones(2), "text"]}
        checkpoint.save(state, checkpoint_id=root, no_dist=True)
        (root / "config.json").write_text("{}")
        expected = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"optimizer.0": torch.ones(2)}
        return Opened(open_source(root), expected, ordered=False)

    def test_what_is_no_tensor_is_said(self, opened: Opened) -> None:
        assert isinstance(opened.source, DcpSource)
        assert set(opened.source.skipped) == {"step", "optimizer.1"}
        assert set(opened.source.files) == {"config.json"}
        assert opened.source.fingerprint is not None


class TestTwoProcesses(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("two") / "checkpoint"
        expected = write_by_two(root, "distcp")
        assert len(list(root.glob("*.distcp"))) == 2
        return Opened(open_source(root), expected, ordered=False)


class TestTwoProcessesInSafetensors(SourceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tmp_path_factory: pytest.TempPathFactory) -> Opened:
        root = tmp_path_factory.mktemp("hf") / "checkpoint"
        expected = write_by_two(root, "huggingface")
        return Opened(open_source(root), expected, ordered=False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save({"w": torch.arange(12.0).reshape(3, 4), "step": 1}, checkpoint_id=tmp_path / "x", no_dist=True)
    return tmp_path / "x"


@dataclass
class Parts:
    """The metadata, the place of the tensor's chunk, and the tensor's own entry, to be spoiled."""

    metadata: Any
    info: Any
    tensor: Any


def change(root: Path, how: Callable[[Parts], object]) -> None:
    metadata: Metadata = pickle.loads((root / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "w")
    how(Parts(metadata, metadata.storage_data[index], metadata.state_dict_metadata["w"]))
    (root / ".metadata").write_bytes(pickle.dumps(metadata))


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        import os

        return os.system, (f"touch {self.path}",)


def replace(of: object, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(of, name, value)


def twice(p: Parts) -> None:
    """Two chunks whose sizes add up, one over the other."""
    p.tensor.chunks = [ChunkStorageMetadata(torch.Size([0, i]), torch.Size([3, 2])) for i in (0, 1)]
    for i in (0, 1):
        p.metadata.storage_data[MetadataIndex("w", (0, i))] = p.info


INVALID = {
    "a path out": lambda p: replace(p.info, relative_path="../x"),
    "an absolute path": lambda p: replace(p.info, relative_path="/etc/passwd"),
    "a missing file": lambda p: replace(p.info, relative_path="__9_9.distcp"),
    "an offset beyond the end": lambda p: replace(p.info, offset=2**40),
    "a negative offset": lambda p: replace(p.info, offset=-5),
    "a length beyond the end": lambda p: replace(p.info, length=2**62),
    "a length of another kind": lambda p: replace(p.info, length="5"),
    "a negative size": lambda p: replace(p.tensor, size=torch.Size([-3, 4])),
    "a size that the chunks do not cover": lambda p: replace(p.tensor, size=torch.Size([6, 4])),
    "a size that is no size": lambda p: replace(p.tensor, size=[3, 4]),
    "a huge size": lambda p: replace(p.tensor, size=torch.Size([2**62, 2**62])),
    "no chunks": lambda p: replace(p.tensor, chunks=[]),
    "chunks that overlap": twice,
    "no places": lambda p: p.metadata.storage_data.clear(),
    "places of another kind": lambda p: replace(p.metadata, storage_data=[1]),
    "entries of another kind": lambda p: p.metadata.state_dict_metadata.update(x=3),
    "a name that is no text": lambda p: p.metadata.state_dict_metadata.update({3: p.tensor}),
    "properties of another kind": lambda p: replace(p.tensor, properties=3),
}


class TestHostile:
    @pytest.mark.parametrize("how", INVALID.values(), ids=INVALID)
    def test_metadata_that_is_not_valid(self, saved: Path, how: Callable[[Parts], object]) -> None:
        change(saved, how)
        with pytest.raises(FormatError):
            open_source(saved)

    def test_nothing_is_run(self, saved: Path) -> None:
        change(saved, lambda p: replace(p.metadata, planner_data=Runs(saved / "ran")))
        with pytest.raises(FormatError, match=r"posix\.system"):
            open_source(saved)
        assert not (saved / "ran").exists()

    def test_nothing_in_a_chunk_is_run(self, saved: Path) -> None:
        torch.save(Runs(saved / "ran"), saved / "evil")
        size = (saved / "evil").stat().st_size
        change(saved, lambda p: replace(p.info, relative_path="evil", offset=0, length=size))
        with pytest.raises(FormatError, match=r"posix\.system"):
            read(open_source(saved), "w")
        assert not (saved / "ran").exists()

    def test_a_chunk_that_is_another(self, saved: Path) -> None:
        torch.save(torch.ones(4, 3), saved / "other")
        size = (saved / "other").stat().st_size
        change(saved, lambda p: replace(p.info, relative_path="other", offset=0, length=size))
        with pytest.raises(FormatError, match="does not hold the chunk"):
            read(open_source(saved), "w")

    def test_a_stream_extension(self, saved: Path) -> None:
        change(saved, lambda p: replace(p.info, transform_descriptors=["stream.zstd"]))
        with pytest.raises(UnsupportedError, match="extension"):
            open_source(saved)

    def test_many_chunks_that_overlap_end_soon(self, saved: Path) -> None:
        def many(p: Parts) -> None:
            replace(p.tensor, size=torch.Size([1, 5000]))
            p.tensor.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 1])) for _ in range(5000)]

        change(saved, many)
        started = time.monotonic()
        with pytest.raises(FormatError, match="overlap"):
            open_source(saved)
        assert time.monotonic() - started < 10

    def test_no_changed_byte_makes_it_fail_otherwise(self, saved: Path) -> None:
        rng = np.random.default_rng(0)
        for name in (".metadata", "__0_0.distcp"):
            sound = (saved / name).read_bytes()
            for at in rng.integers(0, len(sound), 300):
                changed = bytearray(sound)
                changed[at] ^= int(rng.integers(1, 256))
                (saved / name).write_bytes(changed)
                with contextlib.suppress(FormatError, UnsupportedError, KeyError):
                    read(open_source(saved), "w")
            (saved / name).write_bytes(sound)
