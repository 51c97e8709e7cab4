"""The files of a checkpoint's directory: what belongs to it, and what does not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, NotFoundError
from modelstore.format.names import check_file
from modelstore.sources.reading import read_whole

# Folders of tools, not of the model.
_PASSED_OVER = frozenset({".git", ".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__", ".locks", ".no_exist"})
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|.*\.(incomplete|lock|tmp|pyc)")

# What `from_pretrained` takes in place of a folder's safetensors: the same weights once more, in another format.
_TWICE = re.compile(
    r"pytorch_model(-\d+-of-\d+|\.[\w-]+)*\.bin(\.index(\.[\w-]+)?\.json)?"
    r"|diffusion_pytorch_model(-\d+-of-\d+|\.[\w-]+)*\.bin(\.index(\.[\w-]+)?\.json)?"
    r"|tf_model(-\d+-of-\d+)?\.h5(\.index\.json)?"
    r"|flax_model(-\d+-of-\d+)?\.msgpack(\.index\.json)?"
    r"|rust_model\.ot"
    r"|model\.ckpt\.(index|meta|data-\d+-of-\d+)"
    r"|(diffusion_pytorch_)?model\.[\w-]+(-\d+-of-\d+)?\.safetensors"  # a variant (fp16): other precision, same weights
    r"|(diffusion_pytorch_)?model\.safetensors\.index\.[\w-]+\.json"
)
# The authors' own layout of the same weights, beside or below (`original/`) the converted ones.
_ORIGINAL = re.compile(r"consolidated([.-][\w-]+)*\.(pth|pt|safetensors)|consolidated\.safetensors\.index\.json")

MAX_FILES = 200_000
MAX_INDEX = 64 << 20  # a million tensors


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory's regular files by relative POSIX path, and what was left out, with the reason."""

    root: Path
    files: dict[str, Path]
    skipped: dict[str, str]

    def take(self, name: str) -> Path:
        """The file of that name; `FormatError` where it is missing or was left out."""
        if name in self.files:
            return self.files[name]
        why = self.skipped.get(name, "it is not there")
        raise FormatError(f"{self.root} has no usable file {name!r}: {why}", object=str(self.root / name))


def scan(root: Path) -> Folder:
    """All regular files under a directory, recursively, in the order of their names.

    Left out: folders of tools (`.git`, caches), litter of downloads, symbolic links that lead out of the directory
    (but into the blobs of the Hugging Face cache it lies in), links to directories, and what is no regular file.
    """
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory", object=str(root))
    allowed = [root.resolve()]
    # …/models--org--name/{snapshots/<commit>, blobs}
    snapshots = [place for place in (root, root.resolve()) if place.parent.name == "snapshots"]
    allowed += [(place.parent.parent / "blobs").resolve() for place in snapshots]
    files: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        for name in [n for n in folders if n in _PASSED_OVER or (here / n).is_symlink()]:
            folders.remove(name)
            if name not in _PASSED_OVER:
                skipped[(here / name).relative_to(root).as_posix()] = "it is a link to a directory"
        folders.sort()
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if _LITTER.fullmatch(name):
                continue
            why = _why_not(path, allowed)
            if why:
                skipped[relative] = why
            else:
                files[check_file(relative)] = path
        if len(files) > MAX_FILES:
            raise FormatError(
                f"{root} has more than {MAX_FILES} files: give the model's own directory", object=str(root)
            )
    return Folder(root, dict(sorted(files.items())), skipped)


def _why_not(path: Path, allowed: list[Path]) -> str | None:
    if path.is_symlink():
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            return f"it is a link out of the directory, to {target}"
    return None if path.is_file() else "it is not a regular file"


def leave_duplicates(folder: Folder, used: set[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to keep beside the weights read from `used`, and those left out, with the reason.

    A weight file in another format or precision is left out where its folder has safetensors (or holds `used`);
    `consolidated.*` at the top or in `original/` is left out too. ONNX, GGUF and the like are other products
    with their own readers, and are kept, as is every file of another kind.
    """
    converted = {str(Path(name).parent) for name in folder.files if name.endswith(".safetensors")}
    converted |= {str(Path(name).parent) for name in used}
    kept: dict[str, Path] = {}
    skipped = dict(folder.skipped)
    for name, path in folder.files.items():
        parent, base = str(Path(name).parent), Path(name).name
        if name in used:
            continue
        twice = parent in converted and _TWICE.fullmatch(base)
        if twice or (parent in (".", "original") and _ORIGINAL.fullmatch(base)):
            skipped[name] = "it holds the same weights as the files that are saved, in another format or precision"
        else:
            kept[name] = path
    return kept, skipped


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an `*.index.json`: tensor → file. `FormatError` where it is not valid or leads outside."""

    def bad(what: str) -> FormatError:
        return FormatError(f"{path}: {what}", object=str(path))

    table = read_json(path)
    weights = table.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise bad("the index has no 'weight_map' from tensors to files")
    for file in {str(f) if not isinstance(f, str) else f for f in weights.values()}:
        try:
            check_file(file)
        except FormatError as error:
            raise bad(f"the index leads outside its directory or to no file ({error})") from None
    if not all(isinstance(file, str) for file in weights.values()):
        raise bad("the index's 'weight_map' must map text to text")
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; `FormatError` where it is anything else, or repeats a key."""
    data = read_whole(path, MAX_INDEX)
    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError(f"{path} is JSON nested too deeply", object=str(path)) from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}", object=str(path)) from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} does not hold a JSON object", object=str(path))
    return table


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table
