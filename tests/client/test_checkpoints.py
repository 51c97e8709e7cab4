"""Checkpoints of real training loops: the model is found, the rest is named, or kept and given back as it was."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import json
import math
import pathlib
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import modelstore
from modelstore.client import Store
from modelstore.errors import FormatError, ModelStoreError, NotFoundError
from modelstore.format.structure import FILE, structure
from modelstore.sources.choosing import Selection
from modelstore.sources.open import open_source
from tests.sources.contract import raw


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return modelstore.open(tmp_path / "store")


def trained(steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model, optimizer, schedule


def imagenet() -> dict[str, Any]:
    """What the PyTorch example for ImageNet saves."""
    model, optimizer, schedule = trained()
    return {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": model.state_dict(),
        "best_acc1": torch.tensor(63.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(raw(a), raw(b))
        )
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, deque)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, argparse.Namespace):
        return isinstance(b, argparse.Namespace) and same(vars(a), vars(b))
    if isinstance(a, pathlib.PurePath):
        return str(a) == str(b)
    return type(a) is type(b) and a == b


def odd() -> dict[str, Any]:
    """Everything that trainers put beside the weights."""
    base = torch.arange(40, dtype=torch.float32)
    marked = torch.ones(3)
    marked.note = "mine"  # type: ignore[attr-defined]
    return {
        "model": OrderedDict(w=base[:8].view(2, 4), tied=base[:8].view(2, 4), p=torch.nn.Parameter(torch.ones(2))),
        "rng": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/tmp/x"), nested=argparse.Namespace(a=None)),
        "milestones": Counter({3: 2, 5: 1}),
        "seen": {1, 2, 3},
        "frozen": frozenset({"a"}),
        "numbers": [float("nan"), float("inf"), -float("inf"), -0.0, 1e-320, 2**70, -(2**64), True, None, 1 + 2j],
        "scalars": [np.float32(1.5), np.int64(7), np.float64("nan"), np.bool_(True)],
        "array": np.arange(6, dtype=">i4").reshape(2, 3).astype("<i4"),
        "default": defaultdict(list, {"a": [1]}),
        "queue": deque([1, 2], 5),
        "bytes": b"\x00\xff",
        "buffer": bytearray(b"abc"),
        "keys": {0: "a", (1, "b"): "c", None: 1, 2.5: 2, True: 3, b"x": 4, 2**62: 5},
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "slice": slice(1, None, 2),
        "range": range(1, 9, 3),
        "marked": marked,
        "view": base[2:20:3],
        "whole": base,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "halves": torch.ones(3, dtype=torch.bfloat16),
        "deep": {"a": [{"b": (torch.ones(1), {"c": torch.zeros(2)})}]},
        "text": "ünï\nx\x1b",
    }


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    ema: torch.Tensor
    color: Color = Color.RED


class Pair(NamedTuple):
    number: int
    tensor: torch.Tensor


class Own(OrderedDict[str, Any]):
    pass


class Fleeting:
    """An object whose array is made anew whenever it is asked for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return Fleeting, (np.full(4, self.number),)


class Many(list[Any]):
    pass


def objects() -> dict[str, Any]:
    return {
        "color": Color.RED,
        "settings": Settings(torch.full((2,), 3.0)),
        "pair": Pair(1, torch.full((2,), 4.0)),
        "ordered": Own(a=1),
        "partial": functools.partial(torch.add, torch.full((2,), 5.0)),
        "function": trained,
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "delta": np.timedelta64(3, "s"),
        "texts": np.array(["a", "bc"]),
        "masked": np.ma.MaskedArray([1, 2], mask=[False, True]),
        "fleeting": Many(Fleeting(n) for n in range(8)),
    }


class TestWhichIsTheModel:
    @pytest.mark.parametrize("name", ["x.pth.tar", "x.ckpt", "x.bin", "x.pth", "x", "x.safetensors", "checkpoint-12"])
    @pytest.mark.parametrize("new", [True, False])
    def test_files_are_known_by_their_content(self, tmp_path: Path, name: str, new: bool) -> None:
        torch.save(imagenet(), tmp_path / name, _use_new_zipfile_serialization=new)
        source = open_source(tmp_path / name)
        assert [spec.name for spec in source.tensors] == list(imagenet()["state_dict"])

    def test_safetensors_of_any_name(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"w": torch.ones(2)}, tmp_path / "weights.bin.1")
        assert [spec.name for spec in open_source(tmp_path / "weights.bin.1").tensors] == ["w"]

    def test_a_key_names_another(self, tmp_path: Path) -> None:
        w, e = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
        torch.save({"state_dict": w, "state_dict_ema": e, "args": argparse.Namespace(a=1)}, tmp_path / "timm")
        found = open_source(tmp_path / "timm")
        assert found.metadata["torch.state_dict"] == "state_dict"
        assert set(found.skipped) == {"timm:state_dict_ema", "timm:args"}  # type: ignore[attr-defined]
        ema = open_source(tmp_path / "timm", choice=Selection(key="state_dict_ema"))
        assert ema.metadata["torch.state_dict"] == "state_dict_ema"
        with pytest.raises(FormatError, match=r"no entry 'other'.*it has 'state_dict', 'state_dict_ema'"):
            open_source(tmp_path / "timm", choice=Selection(key="other"))
        torch.save({"a": w, "b": w, "optimizer": {"lr": 1}}, tmp_path / "three")
        with pytest.raises(FormatError, match=r"not a state dict: name by key= one of 'a', 'b'"):
            open_source(tmp_path / "three", choice=Selection(key="optimizer.lr"))
        torch.save({"a.b": {"c": w}, "x": torch.ones(1)}, tmp_path / "dots")
        assert open_source(tmp_path / "dots", choice=Selection(key="a.b.c")).tensors[0].name == "w"
        assert open_source(tmp_path / "dots", choice=Selection(key=".")).tensors[0].name == "x"

    def test_several_are_not_guessed(self, tmp_path: Path) -> None:
        w = {"w": torch.ones(2)}
        torch.save({"netG": w, "netD": w, "epoch": 3}, tmp_path / "gan")
        with pytest.raises(FormatError, match=r"several state dicts \(netG, netD\): say which"):
            open_source(tmp_path / "gan")

    def test_options_of_other_kinds_are_refused(self, tmp_path: Path, store: Store) -> None:
        for options in ({"key": "x"}, {"include": "all"}, {"gguf": "blocks"}):
            with pytest.raises(ValueError, match="leave it out"):
                store.save("m", torch.nn.Linear(1, 1), **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"one of .?model.?, .?all"):
            store.save("m", {}, include="*.weight")  # type: ignore[arg-type]

    def test_what_is_left_out_is_named(self, tmp_path: Path, store: Store) -> None:
        torch.save(imagenet(), tmp_path / "x.pth.tar")
        saved = store.save("m", tmp_path / "x.pth.tar")
        left = {item.name.partition(":")[2]: item for item in saved.left_out}
        assert left.keys() == {"epoch", "arch", "best_acc1", "optimizer", "scheduler"}
        assert left["optimizer"].bytes > 100
        assert left["best_acc1"].bytes == 4
        with pytest.raises(NotFoundError, match='include="all"'):
            store.checkpoint("m")


class TestEverything:
    @pytest.mark.parametrize("how", ["file", "old file", "memory"])
    def test_an_optimizer_goes_on(self, tmp_path: Path, store: Store, how: str) -> None:
        saved: Any = imagenet()
        if how != "memory":
            torch.save(imagenet(), tmp_path / "x", _use_new_zipfile_serialization=how == "file")
        store.save("m", saved if how == "memory" else tmp_path / "x", include="all")
        given = store.checkpoint("m")
        assert same(given, saved)
        assert given["state_dict"]._metadata == saved["state_dict"]._metadata
        model, optimizer, schedule = trained(0)
        model.load_state_dict(given["state_dict"])
        optimizer.load_state_dict(given["optimizer"])
        schedule.load_state_dict(given["scheduler"])
        assert same(optimizer.state_dict(), saved["optimizer"])
        assert list(store.load("m")) == list(saved["state_dict"])  # the model is the model alone
        assert "optimizer.state.0.exp_avg" in store.load("m:checkpoint")

    @pytest.mark.parametrize("how", ["file", "old file", "memory"])
    def test_every_plain_value_comes_back(self, tmp_path: Path, store: Store, how: str) -> None:
        if how != "memory":
            torch.save(odd(), tmp_path / "x", _use_new_zipfile_serialization=how == "file")
        store.save("m", odd() if how == "memory" else tmp_path / "x", include="all", key="model")
        given, wanted = store.checkpoint("m"), odd()
        for name, value in wanted.items():
            assert same(value, given[name]), (name, given[name])
        assert given["default"].default_factory is list
        assert given["queue"].maxlen == 5
        memory = {given[name].untyped_storage().data_ptr() for name in ("view", "whole")}
        assert memory == {given["model"]["w"].untyped_storage().data_ptr()}
        assert given["model"]["tied"] is given["model"]["w"]
        given["whole"][2] = 99
        assert given["view"][0] == 99

    def test_objects_are_inert(self, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("of_a_trainer")
        exec(
            "class Config(dict):\n def __init__(self, **k): super().__init__(k); self.a = 1\nclass Plain: pass",
            module.__dict__,
        )
        monkeypatch.setitem(sys.modules, "of_a_trainer", module)
        plain = module.Plain()
        plain.x = torch.ones(2)
        torch.save({"state_dict": {"w": torch.ones(1)}, "c": module.Config(b=2), "p": plain}, tmp_path / "x")
        monkeypatch.delitem(sys.modules, "of_a_trainer")
        store.save("m", tmp_path / "x", include="all")
        given = store.checkpoint("m")
        assert isinstance(given["p"], modelstore.Inert)
        assert given["p"].kind == "of_a_trainer.Plain"
        assert torch.equal(given["p"].state["x"], torch.ones(2))
        assert given["c"].items == [("b", 2)]
        assert "of_a_trainer" not in sys.modules

    @pytest.mark.parametrize("how", ["file", "memory"])
    def test_objects_of_any_class_keep_what_they_are_made_of(self, tmp_path: Path, store: Store, how: str) -> None:
        saved: Any = {"model": {"w": torch.ones(1)}, **objects()}
        if how == "file":
            torch.save(saved, tmp_path / "x")
        store.save("m", saved if how == "memory" else tmp_path / "x", include="all")
        given = store.checkpoint("m")
        assert all(isinstance(given[name], modelstore.Inert) for name in objects())
        assert given["color"].args == (1,)
        assert torch.equal(given["settings"].state["ema"], torch.full((2,), 3.0))
        assert torch.equal(given["pair"].args[1], torch.full((2,), 4.0))
        assert given["ordered"].items[0][0] == "a"
        assert torch.equal(given["partial"].state[1][0], torch.full((2,), 5.0))
        assert given["function"].kind == f"class {__name__}.trained"
        assert given["masked"].kind == "numpy.ma.core._mareconstruct"
        # Arrays that exist only while their object is looked at are told apart.
        made = [item.args[0] for item in given["fleeting"].elements]
        assert [array.tolist() for array in made] == [[n] * 4 for n in range(8)]

    @pytest.mark.parametrize(
        "odd", [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.ones(2, device="meta")]
    )
    def test_tensors_without_dense_values_beside_the_weights_are_named(self, store: Store, odd: torch.Tensor) -> None:
        saved = {"model": {"w": torch.ones(1)}, "x": odd}
        assert {item.name for item in store.save("m", saved, key="model").left_out} == {"x"}
        with pytest.raises(TypeError, match=r"x is a tensor without dense values"):
            store.save("m", saved, include="all")

    def test_versions_share_what_is_the_same_and_are_checked_as_a_whole(self, tmp_path: Path, store: Store) -> None:
        torch.save(imagenet(), tmp_path / "x")
        first = store.save("m", tmp_path / "x", include="all")
        again = store.save("m", tmp_path / "x", include="all")
        assert first.stored > 0
        assert again.stored == 0
        assert store.verify("m@2").ok
        store.delete("m@1")
        store.delete("m@2:checkpoint")  # the optimizer's state alone
        store.gc(grace=0) if "grace" in Store.gc.__annotations__ else store.gc()
        assert set(store.load("m")) == set(imagenet()["state_dict"])

    def test_a_copy_has_it_too(self, tmp_path: Path, store: Store) -> None:
        store.save("m", imagenet(), include="all")
        store.copy("m", tmp_path / "other")
        assert same(modelstore.open(tmp_path / "other").checkpoint("m"), imagenet())

    def test_what_cannot_be_kept_is_refused(self, store: Store, tmp_path: Path) -> None:
        for odd, said in (
            (threading.Lock(), "lock"),
            (lambda: 1, "function"),
            (torch.ones(1).untyped_storage(), "storage"),
        ):
            with pytest.raises(TypeError, match=rf"x\.y is a .*{said}.*, which is not a plain value"):
                store.save("m", {"model": {"w": torch.ones(1)}, "x": {"y": odd}}, include="all")
        torch.save({"model": {"w": torch.ones(1)}, "x": torch.eye(2).to_sparse()}, tmp_path / "x")
        with pytest.raises(ModelStoreError, match="a sparse tensor, which is not kept"):
            store.save("m", tmp_path / "x", include="all")
        loop: list[Any] = []
        loop.append(loop)
        torch.save({"model": {"w": torch.ones(1)}, "x": loop}, tmp_path / "x")
        with pytest.raises(ModelStoreError, match="repeats itself"):
            store.save("m", tmp_path / "x", include="all")
        assert not (tmp_path / "store").exists()


class TestDamaged:
    @pytest.mark.parametrize(
        "root",
        [
            ["tensor", "none"],
            ["open", "x"],
            ["__init__", {}],
            {"a": 1},
            ["dict", [["list"], 1]],
            ["dict", [1]],
            ["range", 0, "x", 1],
            ["scalar", "O", ""],
            ["device", "nothing"],
            ["dtype", "Tensor"],
            ["int", "zz"],
            ["bytes", "%"],
            ["dict", *([["int", hex(i * (2**61 - 1))], None] for i in range(2000))],
        ],
    )
    def test_files_that_are_not_valid(self, root: Any) -> None:
        with pytest.raises(FormatError, match=FILE):
            structure(json.dumps({"format": 1, "root": root}).encode(), {})

    def test_views_that_would_span_much_stay_apart(self) -> None:
        many = {f"{i}{side}": [i, at, [1]] for i in range(50) for side, at in (("a", 1 << 23), ("b", 0))}
        many |= {"far": [99, 1 << 40, [1]], "near": [99, 0, [1]]}
        table = {"format": 1, "views": many, "root": ["list", *(["tensor", name] for name in many)]}
        tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(many)}
        made = structure(json.dumps(table).encode(), tensors)
        assert all(torch.equal(tensor, there) for tensor, there in zip(made, tensors.values(), strict=True))
        memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made}
        assert sum(memories.values()) < 65 << 20  # of all together, whatever the file says

    def test_depth_and_other_formats(self) -> None:
        for data in (b"[" * 100_000, b'{"format":2}', b"x", b'{"format":1}'):
            with pytest.raises(FormatError, match=FILE):
                structure(data, {})
