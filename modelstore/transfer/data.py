"""Texts that a student is trained on: read, cut into tokens, packed into windows; their order is a function of a seed alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.errors import NotFoundError, UnsupportedError
from modelstore.format.digest import name_of
from modelstore.paths import from_home, read_text

if TYPE_CHECKING:
    import torch

TextPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_PLAIN = (".txt", ".text", ".md")
_SUFFIXES = (*_PLAIN, ".jsonl", ".parquet")
_FIELD = "text"  # of JSON lines and of Parquet
_LARGEST = 1 << 30  # bytes of one file
_HELD_TOKENS = 2048  # that are held out, unless they are a tenth of all
_HELD_SHARE = 10


@dataclass(frozen=True)
class TextSource:
    """One file: its name, the documents in it, and the digest of them, which is the one that `eval` keeps of a plain text."""

    name: str
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The digest of the documents, one after the other."""
        return name_of("".join(self.documents).encode())


def read(data: TextPaths) -> list[TextSource]:
    """The texts of a file, of the files in a folder, or of a list of such; `NotFoundError` if there are none."""
    found = [TextSource(path.name, tuple(_documents(path))) for one in _listed(data) for path in _files(from_home(one))]
    if not any(any(document.strip() for document in text.documents) for text in found):
        raise ValueError("data= holds no text: give files that have some")
    return found


def _listed(data: TextPaths) -> Sequence[str | os.PathLike[str]]:
    given = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not given:
        raise ValueError("data= is an empty list: give the paths of texts")
    return given


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise NotFoundError(f"there is no file or folder {path}: give texts to train on", object=str(path))
        return [path]
    inside = [one for one in sorted(path.iterdir()) if one.suffix in _SUFFIXES and not one.name.startswith(".")]
    if not inside:
        raise NotFoundError(
            f"folder {path} has no files {', '.join(_SUFFIXES)}: give texts to train on", object=str(path)
        )
    return inside


def _documents(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _rows(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(read_text(path, _LARGEST).splitlines(), 1):
            if line.strip():
                yield _field(path, number, line)
    else:
        yield read_text(path, _LARGEST)


def _field(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)[_FIELD]
    except (ValueError, KeyError, TypeError, IndexError):
        found = None
    if not isinstance(found, str):
        raise ValueError(f"line {number} of {path} is not a JSON object with a {_FIELD!r}")
    return found


def _rows(path: Path) -> list[str]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise UnsupportedError(f"{path} is read with pyarrow: pip install pyarrow") from None
    try:
        column = parquet.read_table(path, columns=[_FIELD]).column(_FIELD)
    except Exception as error:  # of many classes, and some are bare
        raise ValueError(f"{path} has no column {_FIELD!r} that can be read ({error})") from None
    return [str(one) for one in column.to_pylist() if one is not None]


@dataclass
class Windows:
    """Windows to train on and windows held out, int64 (windows, length), and where they come from.

    `recorded`: a manifest's entry. `remarks`: what one should know of the data.
    """

    ids: torch.Tensor
    held: torch.Tensor
    seed: int
    recorded: dict[str, Any]
    remarks: tuple[str, ...] = ()
    _orders: dict[int, torch.Tensor] = field(default_factory=dict)

    def batch(self, step: int, count: int) -> torch.Tensor:
        """The windows of a step, int64 (count, length): the same for the same seed, whatever was asked before."""
        import torch

        there = len(self.ids)
        places = [divmod(at, there) for at in range(step * count, (step + 1) * count)]
        return torch.stack([self.ids[int(self._order(epoch)[at])] for epoch, at in places])

    def _order(self, epoch: int) -> torch.Tensor:
        import torch

        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed(self.seed + (epoch << 32))
            self._orders[epoch] = torch.randperm(len(self.ids), generator=generator)
        return self._orders[epoch]


def windows(
    texts: Sequence[TextSource],
    held_out: Sequence[TextSource] | None,
    cut: Callable[[Sequence[str]], list[list[int]]],
    vocabulary: int,
    length: int,
    seed: int,
) -> Windows:
    """Texts as windows of `length` tokens. Without `held_out` some windows, drawn by the seed, are held out of the data.

    `ValueError` if there are too few tokens, or one that the model does not know.
    """
    import torch

    found = _packed(texts, cut, vocabulary, length)
    most = max(1, _HELD_TOKENS // length)
    if held_out is not None:
        held, there = _packed(held_out, cut, vocabulary, length)[:most], found
    else:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        few = max(1, min(most, len(found) // _HELD_SHARE))
        held, there = found[order[:few]], found[order[few:].sort().values]
    if not len(there) or not len(held):
        raise ValueError(f"the data has {len(found)} windows of {length} tokens: give more text, or a smaller length=")
    sources = {text.name: text.digest for text in texts}
    recorded: dict[str, Any] = {
        "digest": name_of(found.numpy().tobytes() + held.numpy().tobytes()),
        "sources": sources,
        "tokens": there.numel(),
        "held_out_tokens": held.numel(),
    }
    if held_out is not None:
        recorded["held_out"] = {text.name: text.digest for text in held_out}
    return Windows(there, held, seed, recorded, _remarks(texts, held_out))


def _packed(
    texts: Sequence[TextSource], cut: Callable[[Sequence[str]], list[list[int]]], vocabulary: int, length: int
) -> torch.Tensor:
    """Windows, int64 (windows, length): of each text its documents one after the other; what is left at its end is left out."""
    import torch

    made = []
    for text in texts:
        tokens = [token for document in cut(text.documents) for token in document]
        if tokens and max(tokens) >= vocabulary:
            raise ValueError(f"the tokenizer knows more tokens than the model's {vocabulary}")
        whole = len(tokens) // length
        made.append(torch.tensor(tokens[: whole * length], dtype=torch.int64).reshape(whole, length))
    return torch.cat(made)


def _remarks(texts: Sequence[TextSource], held_out: Sequence[TextSource] | None) -> tuple[str, ...]:
    if held_out is None:
        return (
            "what is held out is of the same texts as what is trained on, so it flatters: give held_out= a text of another "
            "source, and judge by the divergence on a third",
        )
    shared = {text.digest for text in texts} & {text.digest for text in held_out}
    if shared:
        both = ", ".join(text.name for text in held_out if text.digest in shared)
        return (f"{both} is trained on and held out: what is measured on it flatters",)
    return ()
