"""Names of models, tags, variants and tensors, and references to them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from modelstore.errors import FormatError

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_RESERVED = frozenset(
    {"versions", "tags", "manifests"}
)  # folders of a model: a model of that name would lie in another's
_WORD = re.compile(r"[A-Za-z_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_CONTROL = re.compile(r"[\x00-\x1f\ud800-\udfff]")  # and halves of pairs, which UTF-8 does not have
ORIGINAL = "original"
LATEST = "latest"
MAX_TENSOR_NAME = 1024
MAX_VERSION = 99_999_998
STAGING = ".modelstore-export"  # the folder in which an export is written before it is moved into its place
_MAX_PATH = 1024  # characters of a stored file's path, and bytes of a new one's
_MAX_FILE = 255  # of each part of it: bytes on every common file system


def is_model(name: object) -> bool:
    """Whether it is a valid name of a model, `name` or `org/name`."""
    parts = name.split("/") if isinstance(name, str) else []
    return 1 <= len(parts) <= 2 and all(_PART.fullmatch(p) for p in parts) and not _RESERVED & set(parts)


def check_model(name: str) -> str:
    """The name of a model, `name` or `org/name`, as it is; `ValueError` if it is not valid."""
    if not is_model(name):
        alone = re.split("[@:]", name, maxsplit=1)[0] if isinstance(name, str) else ""
        if alone != name and is_model(alone):
            raise ValueError(f"{name!r} names more than a model: this takes a model's name alone, such as {alone!r}")
        raise ValueError(
            f"model name {name!r} is not valid: write 'name' or 'org/name' with letters, digits, '.', '_' and '-', "
            f"each part at most 96 long and not one of {', '.join(sorted(_RESERVED))}"
        )
    return name


def is_word(word: object) -> bool:
    """Whether it is a valid name of a tag or variant."""
    return isinstance(word, str) and bool(_WORD.fullmatch(word)) and word != LATEST


def check_word(word: str, what: str) -> str:
    """A tag's or variant's name as it is; `ValueError` if it is not valid. It never looks like a number."""
    if not is_word(word):
        raise ValueError(
            f"{what} {word!r} is not valid: begin with a letter, go on with letters, digits, '.', '_' and '-', at most 96"
            + (f"; {LATEST!r} always means the newest version" if word == LATEST else "")
        )
    return word


def check_tag(tag: str) -> str:
    """The name of a tag that is set, as it is; `ValueError` if it is not valid, or the name of every version's weights."""
    if check_word(tag, "tag") == ORIGINAL:
        raise ValueError(f"tag {tag!r} is the name of a variant, which every version has: choose another name")
    return tag


def check_tensor(name: str) -> str:
    """The name of a tensor read from a file or manifest; `FormatError` if no store can hold it."""
    if (
        not name
        or name == "__metadata__"
        or len(name.encode("utf-8", "surrogatepass")) > MAX_TENSOR_NAME
        or _CONTROL.search(name)
    ):
        raise FormatError(
            f"tensor name {name[:80]!r} is empty, reserved, over {MAX_TENSOR_NAME} bytes or has control characters: rename it",
            tensor=name[:80],
        )
    return name


def check_tensors(names: Collection[str]) -> None:
    """As `check_tensor` of each, at a fiftieth of the cost where all are valid."""
    short = max(map(len, names), default=0) <= MAX_TENSOR_NAME // 4  # in characters, of at most four bytes each
    try:
        together = "".join(names).encode()
        plain = len(together) == len(together.translate(None, bytes(range(32))))
    except UnicodeEncodeError:  # a half of a pair
        plain = False
    if not short or "" in names or "__metadata__" in names or not plain:
        for name in names:
            check_tensor(name)


def check_file(path: str) -> str:
    """The relative POSIX path of a model's file; `FormatError` if it could lead out of its folder."""
    parts = path.split("/")
    bad = any(p in ("", ".", "..") or len(p) > _MAX_FILE for p in parts) or "\\" in path or bool(_CONTROL.search(path))
    if bad or len(path) > _MAX_PATH or re.match(r"[A-Za-z]:", path):
        raise FormatError(
            f"file name {path[:80]!r} is not a plain relative path: rename or leave out the file", object=path[:80]
        )
    return path


def check_new_files(paths: Collection[str]) -> None:
    """The paths of all files of a model that is saved; `FormatError` if no export could write them.

    Stricter than `check_file`, which also reads what was saved before.
    """
    for path in paths:
        parts = check_file(path).split("/")
        longest = max(len(part.encode()) for part in parts)
        if longest > _MAX_FILE or len(path.encode()) > _MAX_PATH:
            raise FormatError(
                f"file name {path[:80]!r} is too long for a file system, at most {_MAX_FILE} bytes between slashes and "
                f"{_MAX_PATH} in all: rename or leave out the file",
                object=path[:80],
            )
        if parts[0].casefold() == STAGING:
            raise FormatError(
                f"file name {path[:80]!r} is in {STAGING}, which is kept for unfinished exports: rename or leave out the file",
                object=path[:80],
            )
        folder = next((over for n in range(1, len(parts)) if (over := "/".join(parts[:n])) in paths), None)
        if folder is not None:
            raise FormatError(
                f"file name {folder[:80]!r} is also the folder of {path[:80]!r}: rename or leave out one of the files",
                object=path[:80],
            )


@dataclass(frozen=True, slots=True)
class Reference:
    """`name[@version-or-tag][:variant]`, parsed. `version` and `tag` are both None for the newest version."""

    name: str
    version: int | None = None
    tag: str | None = None
    variant: str = ORIGINAL

    def __str__(self) -> str:
        at = self.tag if self.version is None else self.version
        return (
            self.name + (f"@{at}" if at is not None else "") + (f":{self.variant}" if self.variant != ORIGINAL else "")
        )

    @property
    def is_newest(self) -> bool:
        """Whether no version is named, so that the newest is meant."""
        return self.version is None and self.tag is None


def parse_reference(text: str) -> Reference:
    """A reference from its text; `ValueError` naming the part that is wrong."""
    if not isinstance(text, str):
        raise TypeError(f"a reference is a text such as 'name@version:variant', not {type(text).__name__}")
    rest, colon, variant = text.partition(":")
    name, at, where = rest.partition("@")
    check_model(name)
    for sign, after, what in ((at, where, "version or tag"), (colon, variant, "variant")):
        if sign and not after:
            raise ValueError(f"{text!r} names no {what} after {sign!r}: name one, or leave {sign!r} out")
    if colon:
        check_word(variant, "variant")
    version = tag = None
    if at:
        if where.isascii() and where.isdigit():
            version = int(where) if len(where) <= 8 else 0
            if not 1 <= version <= MAX_VERSION:
                raise ValueError(f"version {where!r} in {text!r} is out of range: versions are 1, 2, 3, …")
        elif where != LATEST:
            tag = check_word(where, "tag")
    return Reference(name, version, tag, variant if colon else ORIGINAL)


def of_version(ref: str, advice: str) -> Reference:
    """A reference to a version as a whole; `ValueError`, ending in the advice, where it names a variant."""
    parsed = parse_reference(ref)
    if ":" in ref:
        raise ValueError(f"{ref!r} names a variant, and {advice}")
    return parsed
