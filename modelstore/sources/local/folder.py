"""The files of a checkpoint's directory: what belongs to it, and what does not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, NotFoundError, StorageError
from modelstore.format.names import check_file
from modelstore.format.objects.record import FOLDERS, SPARE, STORE_KEY
from modelstore.paths import explained
from modelstore.sources.local.reading import read_whole
from modelstore.sources.local.states import State, settle, state_below

# Hidden files that belong to a model. Others (.env, .netrc, .ssh/, .aws/) hold secrets as often as not.
_HIDDEN = frozenset({".gitattributes", ".eval_results"})
_ANNEX = (".git", "annex", "objects")  # where the files that git-annex manages lie, with links to them

# Folders of tools and file systems, not of the model.
PASSED_OVER = frozenset(
    {".git", ".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__", ".locks", ".no_exist", "lost+found"}
)
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|.*\.(incomplete|lock|tmp|pyc)")

# Weights that `from_pretrained` takes in place of a folder's safetensors: the same weights once more, in another format.
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
_LFS = b"version https://git-lfs"
_LFS_MOST = 1024  # bytes of a pointer
MAX_INDEX = 64 << 20  # a million tensors


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory's regular files by relative POSIX path, what was left out, with the reason, and the files' states."""

    root: Path
    files: dict[str, Path]
    skipped: dict[str, str]
    states: dict[Path, State]

    def take(self, name: str) -> Path:
        """The file of that name; `FormatError` if it is missing or was left out."""
        if name in self.files:
            return self.files[name]
        why = self.skipped.get(name, "it is not there")
        raise FormatError(f"{self.root} has no usable file {name!r}: {why}", object=str(self.root / name))

    def part(self, prefix: str) -> Folder:
        """The files below a folder within (its path, ending in "/"), by paths from there."""
        return Folder(
            self.root / prefix,
            {name.removeprefix(prefix): path for name, path in self.files.items() if name.startswith(prefix)},
            {name.removeprefix(prefix): why for name, why in self.skipped.items() if name.startswith(prefix)},
            self.states,
        )


def scan(root: Path, *, keep: frozenset[str] = frozenset()) -> Folder:
    """All regular files under a directory, recursively, in the order of their names.

    Left out: folders of tools (`.git`, caches), litter of downloads, hidden files and folders except those that belong to a
    model or are in `keep`, symbolic links that lead out of the directory (except into the blobs of its own Hugging Face cache)
    or to an entry that would be left out, links to directories, stores, and everything that is not a regular file.
    """
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory", object=str(root))
    allowed = [root.resolve(), *_blobs(root)]
    files: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    states: dict[Path, State] = {}
    for folder, folders, names in walk(root):
        here = Path(folder)
        for name in sorted(folders):
            why = "it is a link to a directory" if (here / name).is_symlink() else hidden((name,), keep)
            why = why or _of_a_store(here, name)
            if name in PASSED_OVER or why:
                folders.remove(name)
            if why and name not in PASSED_OVER:
                skipped[(here / name).relative_to(root).as_posix()] = why
        folders.sort()
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if _LITTER.fullmatch(name):
                continue
            real = path.resolve() if path.is_symlink() else allowed[0] / relative
            why = _of_a_store(here, name) or hidden((name,), keep)
            try:
                why = why or _why_not(path, real, allowed, keep)
                state = None if why else _state(real, allowed)
            except OSError as error:
                raise unreadable(path, error) from error
            if state is None:
                skipped[relative] = why or "it is not a regular file"
            else:
                check_fetched(path)
                files[check_file(relative)] = path
                states[path] = state
        if len(files) > MAX_FILES:
            raise FormatError(
                f"{root} has more than {MAX_FILES} files: give the model's own directory", object=str(root)
            )
    settle(states.values())
    return Folder(root, dict(sorted(files.items())), skipped, states)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`; a folder that cannot be read is a `StorageError`, and is not passed over as if it were empty."""
    return os.walk(root, onerror=_refused)


def check_fetched(path: Path) -> None:
    """`FormatError` if a file is the few lines that Git LFS leaves in the place of one that it has not fetched."""
    if len(_LFS) <= path.stat().st_size <= _LFS_MOST and path.read_bytes().startswith(_LFS):
        raise FormatError(
            f"{path} is a pointer of Git LFS, not the file: run 'git lfs pull' where it was cloned", object=str(path)
        )


def _of_a_store(folder: Path, name: str) -> str | None:
    """Why a name in a folder is left out that belongs to a store, in it or next to the model's files; None for others."""
    inside, beside = folder / name / STORE_KEY, folder / STORE_KEY
    own = name in (STORE_KEY, SPARE) or f"{name}/" in FOLDERS
    # `os.path`: a folder that may not be looked into is met when it is read.
    return "it is a store" if os.path.isfile(inside) or (own and os.path.isfile(beside)) else None  # noqa: PTH113


def _blobs(root: Path) -> list[Path]:
    """The places of the files of a snapshot of the Hugging Face cache: …/models--org--name/{snapshots/<commit>, blobs}.

    Blobs that are a link themselves are none of the cache's.
    """
    snapshots = [place for place in (root, root.resolve()) if place.parent.name == "snapshots"]
    found = [place.parent.parent / "blobs" for place in snapshots]
    return [blobs.resolve() for blobs in found if blobs.is_dir() and not blobs.is_symlink()]


def hidden(parts: Sequence[str], keep: frozenset[str] = frozenset()) -> str | None:
    """Why a path is left out whose names are `parts`, where one of them is hidden; None if none is."""
    if any(part.startswith(".") and part not in _HIDDEN and part not in keep for part in parts):
        return "it is hidden"
    return None


def _why_not(path: Path, real: Path, allowed: Sequence[Path], keep: frozenset[str]) -> str | None:
    """Why a file is left out, where `real` is what it leads to."""
    if path.is_symlink():
        if not any(real.is_relative_to(root) for root in allowed):
            return f"it is a link out of the directory, to {real}"
        if real.is_relative_to(allowed[0]):
            parts = real.relative_to(allowed[0]).parts
            if parts[:3] != _ANNEX and hidden(parts, keep):
                return f"it is a link to what is hidden, {real}"
    return None if path.is_file() else "it is not a regular file"


def _state(real: Path, allowed: Sequence[Path]) -> State | None:
    """The state of a file, which is reached without following a link: one put there meanwhile leads nowhere."""
    root = next((root for root in allowed if real.is_relative_to(root)), None)
    return None if root is None else state_below(root, real)


def unreadable(path: Path, error: OSError) -> StorageError:
    """The error of a part of a model that the operating system does not let anyone read: it is not left out in silence."""
    return StorageError(f"cannot read {path}: {explained(error)}, or move it out of the folder", object=str(path))


def _refused(error: OSError) -> None:
    raise unreadable(Path(str(error.filename)), error) from error


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
    """The `weight_map` of an `*.index.json`: tensor → file. `FormatError` if it is not valid or leads outside."""

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
    """A JSON object from a file of bounded size; `FormatError` if it is anything else, or repeats a key."""
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
