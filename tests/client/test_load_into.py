"""Modules as they are: wrapped, compiled, without memory."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import modelstore as ms
from tests.client.test_parts_processes import run_all
from tests.helpers.stores import all_bits

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture
def store() -> ms.Store:
    return ms.open(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: nn.DataParallel(module),
        lambda module: torch.compile(module),
        lambda module: nn.DataParallel(torch.compile(module)),
        lambda module: nn.parallel.DistributedDataParallel(module),
        lambda module: torch.compile(nn.parallel.DistributedDataParallel(module)),
    ],
    ids=["DataParallel", "compiled", "both", "DDP", "compiled DDP"],
)
def test_a_wrapped_module_is_loaded_as_it_was_saved(store: ms.Store, group: None, wrap: object) -> None:
    given = layers()
    store.save("m", wrap(given))  # type: ignore[operator]
    inner = layers()
    module = wrap(inner)  # type: ignore[operator]
    store.load_into(module, "m")
    assert all_bits(inner.state_dict()) == all_bits(given.state_dict())
    assert all_bits(store.load("m")) == all_bits(given.state_dict())


def test_what_has_copies_for_tensors_is_refused(store: ms.Store, group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    store.save("m", layers())
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*before it is wrapped"):
        store.load_into(FullyShardedDataParallel(layers(), device_id=torch.device("cpu")), "m")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (torch.zeros(8, 8).to_sparse(), "'b' of the module is of layout sparse_coo"),
        (torch.zeros(8, 1).expand(8, 8), "'b' of the module is expanded"),
        (torch.quantize_per_tensor(torch.zeros(8, 8), 0.1, 0, torch.qint8), "'b' of the module is quantized"),
    ],
    ids=["sparse", "expanded", "quantized"],
)
def test_what_cannot_be_written_into_is_refused_before_anything_is(
    store: ms.Store, place: torch.Tensor, says: str
) -> None:
    store.save("m", {"a": torch.ones(8), "b": torch.ones(8, 8)})
    module = nn.Module()
    module.a = nn.Parameter(torch.zeros(8))
    module.register_buffer("b", place)
    with pytest.raises(ValueError, match=says):
        store.load_into(module, "m")
    assert not module.a.any()


def test_a_module_without_shapes_is_refused(store: ms.Store) -> None:
    store.save("m", {"weight": torch.ones(8, 8), "bias": torch.ones(8)})
    with pytest.raises(ValueError, match="'weight' of the module does not have a shape yet"):
        store.load_into(nn.LazyLinear(8), "m")


@pytest.mark.parametrize("meta", [False, True], ids=["own memory", "meta"])
def test_a_sharded_module_is_filled(store: ms.Store, group: None, meta: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    given = layers()
    store.save("m", given)
    with torch.device("meta" if meta else "cpu"):
        module = layers()
    fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"leave shard= out"):
        store.load_into(module, "m", shard={"0.weight": None})
    store.load_into(module, "m")
    found = {name: value.full_tensor() for name, value in module.state_dict().items()}
    assert all_bits(found) == all_bits(given.state_dict())
    with pytest.raises(ValueError, match=r"DTensor.*cannot be exchanged"):
        store.follow("m", into=module)


def fill(url: str, meeting: str, rank: int) -> None:
    """What a rank's process runs: two ways to shard, each filled, computed with, and saved again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        store, given = ms.open(url), layers()
        given.load_state_dict(store.load("m"))
        x = torch.arange(8.0)
        for number, where in enumerate(["meta", "cpu", "cpu"]):
            with torch.device(where):
                module = layers()
            if number == 2:
                parallelize_module(module, mesh, {"0": ColwiseParallel(use_local_output=False)})
            else:
                fully_shard(module, mesh=mesh)
            read: list[int] = []
            store.load_into(module, "m", progress=lambda _done, total, _what, read=read: read.append(total))  # type: ignore
            whole = {
                name: value.full_tensor() if hasattr(value, "full_tensor") else value
                for name, value in module.state_dict().items()
            }
            assert all_bits(whole) == all_bits(given.state_dict())
            assert read[0] < sum(value.nbytes for value in whole.values()), "a rank reads its own part"
            if number < 2:
                assert torch.equal(module(x), given(x))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_rank_reads_what_it_holds(tmp_path: Path) -> None:
    """Of 8 rows three ranks hold 3, 3 and 2."""
    ms.open(str(tmp_path / "store")).save("m", layers())
    run_all(fill, str(tmp_path / "store"), str(tmp_path / "meeting"), ranks=3)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mixtral", "Gemma2", "Bert"])
def test_a_model_of_transformers_on_the_meta_device_computes(store: ms.Store, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    more = {"num_local_experts": 2} if kind == "Mixtral" else {"head_dim": 8} if kind in ("Qwen3", "Gemma2") else {}
    keys = {} if kind == "Bert" else {"num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**CONFIG, **keys, **more)
    cls = getattr(transformers, f"{kind}ForMaskedLM" if kind == "Bert" else f"{kind}ForCausalLM")
    torch.manual_seed(0)
    given = cls(config).eval()
    store.save("m", given)
    with torch.device("meta"):
        module = cls(config).eval()
    store.load_into(module, "m")
    assert not [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, given(tokens).logits)


class Table(nn.Module):
    """A table that its class does not make again, or makes at random."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.random = random

    def _init_weights(self, part: nn.Module) -> None:
        if self.random and hasattr(part, "table"):
            nn.init.normal_(part.table)


@pytest.mark.parametrize("random", [False, True])
def test_a_buffer_that_nobody_makes_is_refused(store: ms.Store, random: bool, caplog: pytest.LogCaptureFixture) -> None:
    store.save("m", Table(random))
    with torch.device("meta"):
        module = Table(random)
    with pytest.raises(ValueError, match=r"buffers table are on the meta device.*nothing was changed"):
        store.load_into(module, "m")
    assert module.proj.weight.is_meta
    assert module.table.is_meta
    with caplog.at_level(logging.WARNING, "modelstore"):
        store.load_into(module, "m", strict=False)
    assert "table" in caplog.text
    assert not module.proj.weight.is_meta


def test_progress_says_what_was_asked_for(store: ms.Store) -> None:
    store.save("m", layers(), tag="prod")
    said: set[str] = set()
    store.load_into(layers(), "m@prod", progress=lambda _done, _total, what: said.add(what))
    assert said == {"loading m@prod"}
