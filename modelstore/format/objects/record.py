"""The records that make a version or a tag visible: small create-only JSON objects, and their keys.

Numbers in keys count down from 99,999,999, so that the newest version, and the newest record of it, is the first key of a
listing: finding it takes one request, however many there are.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from modelstore.errors import FormatError
from modelstore.format.names import ORIGINAL, check_model, check_word, is_model
from modelstore.format.objects.manifest import Count, Digest
from modelstore.format.objects.note import Note
from modelstore.format.objects.sealed import unseal

_LAST = 99_999_999
LAST = _LAST - 1  # the highest number of a version, or of a record
STORE_KEY = "modelstore.json"
PACKS = "packs/"
JOBS = "jobs/"
MODELS = "models/"
_OWN = re.compile(
    r"packs/([0-9a-f]{2})/\1[0-9a-f]{62}\.safetensors"
    r"|models/.+/manifests/[0-9a-f]{64}\.json\.zst"
    r"|jobs/(?:clock-)?[0-9a-f]{32}/.+|jobs/probe-[0-9a-f]{16}\.json"
    r"|intents/[0-9a-f]{32}(?:-[0-9]{1,8}-[0-9]{1,8}-.+)?\.json"
    r"|condemned/[0-9a-f]{32}/(?:candidates|verdict)\.json"
)
SPARE = ".tmp-spare"  # in a folder: no object, but what is held for works that free a full disk
FOLDERS = (PACKS, JOBS, MODELS, "intents/", "condemned/")  # all that a store has


class StoreInfo(msgspec.Struct, frozen=True):
    """`modelstore.json`: the version of the format, and the store's id."""

    format: int
    id: str


class VariantEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A variant's manifest, its copy (a pack), and its sizes: raw values, stored chunks. `sketch`: of its values, as `sketch.py`
    has it; of originals that `save` made.
    """

    manifest: Digest
    copy: Digest
    nbytes: Count
    stored: Count
    tensors: Count
    codec: str
    created: float
    sketch: bytes = b""


class VersionRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One state of a version. The record with the highest number is the truth; `deleted` is final."""

    format: int
    model: str
    version: Count
    number: Count
    writer: str
    created: float
    variants: dict[str, VariantEntry]
    deleted: bool = False
    note: Note | None = None


class TagRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One state of a tag; version 0 means that the tag is gone."""

    format: int
    model: str
    tag: str
    number: Count
    writer: str
    created: float
    version: Count


R = TypeVar("R", StoreInfo, VersionRecord, TagRecord)


def parse(data: bytes, kind: type[R], where: str) -> R:
    """A record from its bytes; `FormatError` if it is not one, `UnsupportedError` for another format's version."""
    return unseal(data, kind, where)


def parse_version(data: bytes, where: str) -> VersionRecord:
    """A version's record; `FormatError` also if it belongs at another key, or does not have an original."""
    record = parse(data, VersionRecord, where)
    if not is_model(record.model) or version_key(record.model, record.version, record.number) != where:
        raise _moved(where, f"version {record.version} of {record.model[:200]!r}")
    if ORIGINAL not in record.variants and not record.deleted:
        raise FormatError(
            f"object {where} is not a valid record (it has no original): run 'modelstore repair'", object=where
        )
    return record


def parse_tag(data: bytes, where: str) -> TagRecord:
    """A tag's record; `FormatError` also where it belongs at another key."""
    record = parse(data, TagRecord, where)
    head, _, last = where.rpartition("/")
    if head != f"{MODELS}{record.model}/tags/{record.tag}" or last != f"{descending(record.number)}.json":
        raise _moved(where, f"tag {record.tag[:200]!r} of {record.model[:200]!r}")
    return record


def _moved(where: str, what: str) -> FormatError:
    return FormatError(
        f"object {where} speaks of {what}: it was moved; put it back, or run 'modelstore repair'", object=where
    )


def descending(number: int) -> str:
    """A number from 1 as 8 digits that sort the highest first."""
    return f"{_LAST - number:08d}"


def ascending(digits: str) -> int | None:
    """The number that `descending` wrote, None if the text is not one."""
    return _LAST - int(digits) if len(digits) == 8 and digits.isascii() and digits.isdigit() else None


def is_record(rest: str) -> bool:
    """Whether what follows the prefix of a version, of a tag, or of all versions of a model is the key of a record."""
    folder, _, name = rest.rpartition("/")
    return (not folder or ascending(folder) is not None) and record_number(name, "") is not None


def record_number(key: str, prefix: str) -> int | None:
    """The number of the record at a key below `prefix`, None if the key is not one of a record there."""
    rest = key[len(prefix) :]
    return ascending(rest.removesuffix(".json")) if key.startswith(prefix) and rest.endswith(".json") else None


def versions_prefix(model: str) -> str:
    """The prefix of the records of all versions of a model; `ValueError` if its name is not valid."""
    return f"{MODELS}{check_model(model)}/versions/"


def version_prefix(model: str, version: int) -> str:
    """The prefix of the records of one version."""
    return f"{versions_prefix(model)}{descending(version)}/"


def version_key(model: str, version: int, number: int) -> str:
    """The key of one record of a version."""
    return f"{version_prefix(model, version)}{descending(number)}.json"


def tags_prefix(model: str) -> str:
    """The prefix of the records of all tags of a model."""
    return f"{MODELS}{check_model(model)}/tags/"


def tag_key(model: str, tag: str, number: int) -> str:
    """The key of one record of a tag; `ValueError` if its name is not valid."""
    return f"{tag_prefix(model, tag)}{descending(number)}.json"


def tag_prefix(model: str, tag: str) -> str:
    """The prefix of the records of a tag; `ValueError` if its name is not valid."""
    return f"{tags_prefix(model)}{check_word(tag, 'tag')}/"


def manifests_prefix(model: str) -> str:
    """The prefix of the manifests of a model."""
    return f"{MODELS}{check_model(model)}/manifests/"


def manifest_key(model: str, digest: str) -> str:
    """The key of the manifest with that digest."""
    return f"{manifests_prefix(model)}{digest}.json.zst"


def is_own(key: str) -> bool:
    """Whether a key is one that is given to what a store holds for a time: packs, manifests, notes of works and collections.

    Objects in the store's folders under other names are not the store's, and are ignored.
    """
    return _OWN.fullmatch(key) is not None


def pack_key(digest: str) -> str:
    """The key of the pack with that digest."""
    return f"{PACKS}{digest[:2]}/{digest}.safetensors"
