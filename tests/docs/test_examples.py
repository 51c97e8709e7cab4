"""What the pages show runs as it stands, block after block, on a small model whose head is tied as most small models' is."""

from __future__ import annotations

import re
import shlex
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelstore as ms
from modelstore.cli.main import app
from tests.helpers.language import TEXT, make_language_model

ROOT = Path(ms.__file__).parent.parent
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HERE = {  # what a page names, and what there is on this machine
    '"cuda"': '"cpu"',
    "print(info.version)": "print(info.version); break",  # a watch goes on for ever
    "torch.distributed.barrier()": "pass",
    "(32000, 4096)": "(4096, 256)",
    "samples=128, length=512": "samples=16, length=64",
}
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "guide",
            "python",
            "compression",
            "layouts",
            "live",
            "zarr",
            "sources",
            "calibration",
            "restructure",
            "distill",
        )
    ),
]

pytestmark = pytest.mark.slow


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of code in a language, in order."""
    return [code for kind, code in FENCED.findall((ROOT / page).read_text()) if kind == language]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model and a fine-tune of it."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    make_language_model(root / "hf_folder")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("hf_folder", "finetune"):
        if name == "finetune":
            shutil.copytree(root / "hf_folder", root / name)
        torch.manual_seed(len(name))
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / name)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 8}
    mixtral = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, **heads
    )
    transformers.MixtralForCausalLM(mixtral).save_pretrained(root / "mixtral")
    return root


@pytest.fixture
def names(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take as given: a store with two versions, a module, and a rank."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "to").symlink_to(models)
    for name in ("book.txt", "emma.txt", "novels/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT * 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "hf_folder", dtype=torch.bfloat16)
    return {
        "ms": ms,
        "np": np,
        "torch": torch,
        "model": model,
        "tokens": torch.zeros(1, 4, dtype=torch.long),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "mine": torch.ones(4096, 256),
        **{"rank": 0, "ranks": 1, "step": 1, "rows": 4096, "version": 1},
    }


def test_every_page_with_python_is_run_or_says_why() -> None:
    elsewhere = {"docs/cluster.md", "docs/deploy.md", "docs/format.md", "docs/codecs.md"}  # Ray; bytes without a store
    elsewhere.add("docs/dcp.md")  # torchrun runs it: tests/integrations/dcp
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    assert {page for page in found if blocks(page, "python")} - elsewhere <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_in_order(page: str, names: dict[str, Any], models: Path) -> None:
    needs = {"zarr": ("zarr", "xarray"), "guide": ("gguf", "tokenizers")}.get(Path(page).stem, ())
    for package in needs:
        pytest.importorskip(package)
    at = uuid.uuid4().hex
    if page not in ("README.md", "docs/guide.md"):
        names["store"] = store = ms.open("store" if page != "docs/live.md" else f"memory://{at}-bucket-models")
        store.save("acme/llama", models / "hf_folder", tag="prod")
        store.save("acme/llama", models / "finetune")
        store.save("acme/mixtral", models / "mixtral")
        config = {"config.json": models / "hf_folder" / "config.json"}
        for _ in range(2):
            store.save("acme/policy", names["model"].state_dict(), files=config, tag="serving")
    for number, block in enumerate(blocks(page, "python")):
        code = re.sub(r"s3://(\w+)/", rf"memory://{at}-\1-", block)
        for shown, here in HERE.items():
            code = code.replace(shown, here)
        try:
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"{page}: {type(error).__name__}: {error}\n\n{block}")


@pytest.mark.parametrize("page", ["README.md", "docs/compression.md"])
def test_commands_run_in_order(
    page: str, names: dict[str, Any], models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names
    monkeypatch.setenv("MODELSTORE_URL", "./store")
    if page != "README.md":
        ms.open("store").save("acme/llama", models / "hf_folder")
    for block in blocks(page, ""):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["modelstore"]:
                assert not app(words[1:], standalone_mode=False), f"{line}\n{capsys.readouterr().err}"
