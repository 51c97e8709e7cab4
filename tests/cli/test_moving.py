"""`copy`, `rename`, `du`, `cat`, and parts of models into files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelstore as ms
from tests.cli.conftest import Command
from tests.cli.models import weights

Answer = Callable[..., Any]


def test_copy(saved: Command, answer: Answer, tmp_path: Path) -> None:
    assert "copied acme/toy@1, with" not in saved("copy", "acme/toy@prod", tmp_path / "other", "--tags").stdout
    other = ms.open(tmp_path / "other")
    assert other.models()[0].tags == {"prod": 1}
    assert torch.equal(other.load("acme/toy")["embed.weight"], weights()["embed.weight"])
    again = saved("copy", "acme/toy@prod", tmp_path / "other").stdout
    assert f"to {tmp_path / 'other'} in" in " ".join(again.split())
    assert "acme/toy@1 is there" in again
    assert "sent 0 packs" in again
    done = answer("copy", tmp_path / "other", "--all")
    assert [(one["source"], one["new"]) for one in done["versions"]] == [("acme/toy@1", False), ("acme/toy@2", True)]
    assert "as mine@2" in saved("copy", "acme/toy", tmp_path / "other", "--name", "mine").stdout


@pytest.mark.parametrize(
    "args", [["acme/toy"], ["acme/toy", "x", "y"], ["acme/toy@1", "x", "--all"], ["acme/toy", "--all"]]
)
def test_copy_used_wrongly(saved: Command, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved("copy", *args, code=2)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "acme").exists()


def test_a_tensor_that_is_not_there_is_suggested(saved: Command, tmp_path: Path) -> None:
    wrong = saved("load", "acme/toy", "--shard", "embed.wieght[0:1]", "-o", tmp_path / "x.safetensors", code=1)
    assert "did you mean 'embed.weight'" in " ".join(wrong.stderr.split())
    assert "NAME" not in wrong.stderr


def test_rename(saved: Command, answer: Answer) -> None:
    assert "2 versions" in saved("rename", "acme/toy", "toy").stdout
    assert answer("ls")[0]["name"] == "toy"
    assert "@1 is now @3" in saved("rename", "toy", "acme/toy").stdout
    saved("rename", "toy", "other", code=1)


def test_gc_compacts(run: Command, answer: Answer, tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    kept, gone = torch.randn(64, 64), torch.randn(256, 256)
    store.save("m", {"kept": kept, "gone": gone})
    store.save("m", {"kept": kept, "new": torch.ones(3)})
    store.delete("m@1")
    assert "dead" in run("gc", "--grace", "0").stdout
    assert "no pack" in run("gc", "--compact").stdout, "deleted just now: readers may be at work"
    would = run("gc", "--compact", "--grace", "0").stdout
    assert "would rewrite 1 pack" in would
    assert "add --delete" in would
    assert answer("gc", "--compact", "--live-share", "1%", "--grace", "0")["compaction"]["packs"] == 0
    done = answer("gc", "--compact", "--delete", "--grace", "0")
    assert done["compaction"]["packs"] == 1
    assert done["bytes"] > gone.nbytes // 2
    assert answer("gc")["dead"] == 0
    assert torch.equal(ms.open(tmp_path / "store").load("m")["kept"], kept)
    for wrong in ("0", "101%", "x", "-1", "nan"):
        run("gc", "--compact", "--live-share", wrong, code=2)


def test_du(saved: Command, answer: Answer) -> None:
    found = answer("du")
    assert found["models"][0]["bytes"] == found["live"] == found["models"][0]["alone"]
    table = saved("du").stdout
    assert "dead" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    assert [one["name"] for one in answer("du", "acme/toy")["versions"]] == ["acme/toy@1", "acme/toy@2"]
    saved("du", "nobody", code=1)


def test_cat(saved: Command) -> None:
    assert json.loads(saved("cat", "acme/toy", "config.json").stdout_bytes)["model_type"] == "toy"
    assert "config.json" in saved("cat", "acme/toy", "other.json", code=1).output


def test_cat_of_a_file_that_export_would_write(saved: Command, tmp_path: Path) -> None:
    saved("export", "acme/toy", str(tmp_path / "out"))
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert saved("cat", "acme/toy", "model.safetensors", "--exported").stdout_bytes == written
    assert "model.safetensors" in saved("cat", "acme/toy", "other.json", "--exported", code=1).output


def test_load_of_some_tensors(saved: Command, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    saved("load", "acme/toy@1", "-o", out, "--names", "layer.0.*", "--names", "steps")
    assert sorted(load_file(out)) == ["layer.0.bias", "layer.0.weight", "steps"]
    assert torch.equal(load_file(out)["layer.0.weight"], weights()["layer.0.weight"])
    saved("load", "acme/toy@1", "-o", out, "--overwrite", "--names", "layer.1.*", code=1)
    saved("load", "acme/toy@1", "-o", out, "--overwrite", "--names", "nope", code=1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model whose architecture is known."""
    random = torch.Generator().manual_seed(1)
    folder = tmp_path / "llama"
    folder.mkdir()
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (32, 16),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.mlp.gate_proj.weight": (24, 16),
        f"{layer}.mlp.up_proj.weight": (24, 16),
        f"{layer}.mlp.down_proj.weight": (16, 24),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    save_file({n: torch.randn(s, generator=random).bfloat16() for n, s in shapes.items()}, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("texts", "shard"),
    [
        (["tp=1/2"], ms.TensorParallel(1, 2)),
        (["pp=0/1", "tp=0/2"], ms.PipelineStage(0, 1) & ms.TensorParallel(0, 2)),
        (["layers=0:1"], ms.Layers(0, 1)),
        (
            ["lm_head.weight[:, 3:9]", "model.norm.weight[...]"],
            ms.Regions({"lm_head.weight": ((0, 32), (3, 9)), "model.norm.weight": None}),
        ),
    ],
)
def test_load_of_a_part_is_what_python_loads(
    run: Command, llama: Path, tmp_path: Path, texts: list[str], shard: Any
) -> None:
    run("save", llama, "llama")
    run("load", "llama", "-o", tmp_path / "out.safetensors", *(arg for text in texts for arg in ("--shard", text)))
    wanted = ms.open(tmp_path / "store").load("llama", shard=shard)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (["--shard", "model.norm.weight[900:1000]"], "900:1000 does not lie within dimension 0, which is 16 long"),
        (["--shard", "model.norm.weight[8:17]"], "8:17 does not lie within dimension 0"),
        (["--shard", "model.norm.weight[4:4]"], "this part holds nothing of model 'llama'"),
        (["--shard", "ep=0/2"], "the model has no experts"),
        (["--shard", "layers=1:1", "--names", "*.mlp.*"], "this part holds nothing"),
        (["--shard", "pp=0/3"], "3 stages of a model that has 1 layers"),
    ],
)
def test_a_part_that_holds_nothing_is_not_written(
    run: Command, llama: Path, tmp_path: Path, parts: list[str], says: str
) -> None:
    run("save", llama, "llama")
    assert says in run("load", "llama", "-o", tmp_path / "out.safetensors", *parts, code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


@pytest.mark.parametrize("command", ["load", "checkpoint"])
def test_what_is_damaged_leaves_nothing_half_written(run: Command, tmp_path: Path, command: str) -> None:
    torch.save({"state_dict": {n: torch.randn(300, 300) for n in "ab"}, "epoch": 1}, tmp_path / "run.pt")
    run("save", tmp_path / "run.pt", "m", "--include", "all")
    for pack in (tmp_path / "store" / "packs").rglob("*.safetensors"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.write_bytes(data)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / ("out.safetensors" if command == "load" else "out.pt")
    run(command, "m", "-o", out, code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_part_of_which_a_tensor_is_empty_says_so(
    run: Command, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("save", llama, "llama")
    parts = ("--shard", "model.norm.weight[4:4]", "--shard", "lm_head.weight[0:2]")
    run("load", "llama", "-o", tmp_path / "out.safetensors", *parts)
    assert "no element of 1 tensors, which are written empty: model.norm.weight" in caplog.text
    assert load_file(tmp_path / "out.safetensors")["lm_head.weight"].shape == (2, 16)


@pytest.mark.parametrize("text", ["3/8", "tp=3", "tp=8/8", "x[1]", "x[::2]", "layers=a:b", ""])
def test_a_part_that_cannot_be_is_wrong_usage(run: Command, llama: Path, tmp_path: Path, text: str) -> None:
    run("save", llama, "llama")
    run("load", "llama", "-o", tmp_path / "out.safetensors", "--shard", text, code=2)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_copy_that_leaves_something_out_does_not_end_as_done(saved: Command, answer: Answer, tmp_path: Path) -> None:
    """A backup is known to be whole by its exit code."""
    store = ms.open(tmp_path / "store")
    store.save("acme/other", {"w": torch.ones(300)})
    before = set((tmp_path / "store/packs").glob("*/*"))
    store.save("acme/damaged", {"w": torch.zeros(7) + 3})
    for pack in set((tmp_path / "store/packs").glob("*/*")) - before:
        pack.unlink()
    done = answer("copy", tmp_path / "there", "--all", code=1)
    assert [said.partition(":")[0] for said in done["left_out"]] == ["acme/damaged@1"]
    assert {one["model"] for one in done["versions"]} == {"acme/toy", "acme/other"}
    assert "left out acme/damaged@1" in saved("copy", tmp_path / "there", "--all", code=1).stderr
