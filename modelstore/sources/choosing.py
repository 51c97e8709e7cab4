"""Which part of a source is saved, and files that are recognised by their content, whatever their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, UnsupportedError
from modelstore.paths import from_home
from modelstore.sources import safetensors
from modelstore.sources.base import Source
from modelstore.sources.local.folder import check_fetched
from modelstore.sources.local.reading import beginning, require_file

INCLUDES = ("model", "all")
GGUFS = ("dequantize", "blocks")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_TAR = (257, b"ustar")  # torch before 0.2


@dataclass(frozen=True, slots=True)
class Selection:
    """The parts of a source that are saved.

    `key` names the model's state dict in a checkpoint; `include` is "model", or "all" to include the content beside it; `gguf`
    is "dequantize" or "blocks", None for the first of them.
    """

    key: str | None = None
    include: str = "model"
    gguf: str | None = None

    def __post_init__(self) -> None:
        if self.include not in INCLUDES:
            raise ValueError(f"include {self.include!r} is not one of {', '.join(INCLUDES)}")
        if self.gguf is not None and self.gguf not in GGUFS:
            raise ValueError(f"gguf {self.gguf!r} is not one of {', '.join(GGUFS)}")
        if self.key is not None and not isinstance(self.key, str):
            raise TypeError(f"key is a text such as 'state_dict', not a {type(self.key).__name__}")

    @property
    def everything(self) -> bool:
        """Whether the content beside the weights is wanted."""
        return self.include == "all"


def open_chosen(what: Any, choice: Selection) -> Source | None:
    """The source, where it is of a kind that has choices or is a file known by its content; None for any other.

    `ValueError` if something is chosen that this kind does not have.
    """
    pickled = choice.key is not None or choice.everything
    if isinstance(what, Mapping) and pickled:
        _only(choice, "a mapping", gguf=False)
        from modelstore.sources.checkpoints.training import open_training

        return open_training(what, choice.key, everything=choice.everything)
    path = from_home(what) if isinstance(what, (str, Path)) and "://" not in str(what) else None
    if path is not None and path.is_file():
        check_fetched(path)
        return _open_file(path, choice)
    if path is not None and path.is_dir() and pickled and _holds_pickled(path):
        _only(choice, "a folder", gguf=False)
        from modelstore.sources.pickles.source import open_directory

        return open_directory(path, key=choice.key, everything=choice.everything)
    if path is not None and path.exists() and not path.is_dir():
        require_file(path)  # says what it is
    _only(choice, "this source", gguf=False, pickled=False)
    return None


def _open_file(path: Path, choice: Selection) -> Source | None:
    head = beginning(path)
    if not head:
        raise FormatError(f"{path} is empty: it was cut short, so copy or save it again", object=str(path))
    if head[:4] == b"GGUF":
        _only(choice, f"{path}, a GGUF file,", pickled=False)
        from modelstore.sources.gguf import open_gguf

        source: Source = open_gguf(path, blocks=choice.gguf == "blocks")
        return source
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise UnsupportedError(f"{path} is a tar archive, as torch before 0.2 wrote it: unpack it, or save it again")
    from modelstore.sources.pickles import source as pickled

    if pickled.recognised(head) or path.suffix in _PICKLED:
        _only(choice, f"{path}, a file of torch.save,", gguf=False)
        return pickled.open_file(path, key=choice.key, everything=choice.everything)
    _only(choice, f"{path}", gguf=False, pickled=False)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return safetensors.open_files([path])
    return None


def _holds_pickled(root: Path) -> bool:
    names = {entry.name for entry in root.iterdir()}
    other = {".metadata", "zarr.json", ".zgroup", ".zarray"} & names or any(".safetensors" in name for name in names)
    return not other and any(name.endswith((*_PICKLED, ".bin.index.json")) for name in names)


def _only(choice: Selection, what: str, *, gguf: bool = True, pickled: bool = True) -> None:
    """`ValueError` if a choice is made that a kind of source does not have."""
    if not pickled and (choice.key is not None or choice.everything):
        name = f"key={choice.key!r}" if choice.key is not None else 'include="all"'
        raise ValueError(f"{name} is for checkpoints of torch.save and mappings, and {what} is none: leave it out")
    if not gguf and choice.gguf is not None:
        raise ValueError(f"gguf={choice.gguf!r} is for GGUF files, and {what} is none: leave it out")
