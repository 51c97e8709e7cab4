"""`export` to what engines load: packed, dense, GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.compress.llama import CONFIG, llama


def test_packed_or_dense(run: Command, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(
        {name: tensor for name, tensor in llama().items() if name != "lm_head.weight"}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    run("save", folder, "acme/llama")
    run("compress", "acme/llama", "int4-rtn")
    run("export", "acme/llama:int4-rtn", tmp_path / "packed")
    run("export", "acme/llama:int4-rtn", tmp_path / "dense", "--dequantize")
    run("compress", "acme/llama", "int8")
    run("export", "acme/llama:int8", tmp_path / "w8a8", "--activations", "int8")
    assert (
        json.loads((tmp_path / "w8a8" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    )
    done = run("export", "acme/llama:int4-rtn", tmp_path / "no", "--activations", "int8", code=1)
    assert "weights of 8 bits" in " ".join(done.output.split())
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert packed["quantization_config"]["format"] == "pack-quantized"
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_gguf(run: Command, saved: Command, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    done = run("export", "acme/toy@1", tmp_path / "m.gguf", "--format", "gguf", code=1)
    assert "'Toy' has no GGUF export" in done.output
    run("export", "acme/toy@1", tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "Q9", code=2)


def test_what_a_folder_still_has_is_remarked(run: Command, saved: Command, tmp_path: Path) -> None:
    run("export", "acme/toy@1", tmp_path / "out")
    (tmp_path / "out/old.txt").write_text("x")
    assert "still has 'old.txt'" in run("export", "acme/toy@1", tmp_path / "out", "--overwrite").stderr
    assert not run("export", "acme/toy@1", tmp_path / "out", "--overwrite", "--quiet").stderr
