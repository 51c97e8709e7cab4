"""Small JSON objects that carry the digest of their own bytes: records, tags, journals, votes.

The digest is the last member: `…,"blake3":"<64 hexadecimal digits>"}`, of all bytes before it. An object without one was
written by an earlier release. It is read if it has only members that such a release wrote, so that damage to the digest's own
name is noticed too.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from modelstore.errors import FormatError
from modelstore.format.digest import name_of
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.newer import check_format

T = TypeVar("T", bound=msgspec.Struct)

_MEMBERS = dict[str, msgspec.Raw]
_encoder = msgspec.json.Encoder(order="deterministic")
_SEAL = re.compile(rb',?"blake3":"([0-9a-f]{64})"\}')
_LONGEST = len(b',"blake3":""}') + 64


def seal(value: msgspec.Struct) -> bytes:
    """The bytes to store of a struct that is encoded as a JSON object."""
    text = _encoder.encode(value)
    assert text.endswith(b"}"), "only objects are sealed"
    head = text[:-1]
    comma = b"" if head == b"{" else b","
    return b'%b%b"blake3":"%b"}' % (head, comma, name_of(head).encode())


def unseal(
    data: bytes, kind: type[T], where: str, *, what: str = "record", advice: str = "run 'modelstore repair'"
) -> T:
    """A struct from its stored bytes, checked against the digest that they carry.

    `FormatError` names the object called `where`: what it was to be (`what`), why it is not, and the `advice`. `UnsupportedError`
    where it is of another format: what the digest proves to be as it was written is not damaged, whatever its members are.
    """

    def wrong(why: object) -> FormatError:
        return FormatError(f"object {where} is not a valid {what} ({why}): {advice}", object=where)

    found = _SEAL.search(data, max(0, len(data) - _LONGEST))
    sealed = found is not None and found.end() == len(data)
    if found is not None and sealed and name_of(data[: found.start()]).encode() != found[1]:
        raise wrong("its bytes do not match its digest")
    if sealed:
        check_format(data, FORMAT, f"object {where}", where)
    try:
        value = msgspec.json.decode(data, type=prepared(kind))
        strange = [] if sealed else msgspec.json.decode(data, type=_MEMBERS).keys() - _members(kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(error if data else "it is empty") from None
    if strange:
        raise wrong(f"it has no digest, and a member {min(strange)[:40]!r}")
    check_format(data, FORMAT, f"object {where}", where)
    return value


def intact(data: bytes) -> bool:
    """Whether these can be the bytes of a small object of any kind: JSON, with a digest that is right or with none."""
    found = _SEAL.search(data, max(0, len(data) - _LONGEST))
    if found is not None and found.end() == len(data):
        return name_of(data[: found.start()]).encode() == found[1]
    try:
        return "blake3" not in msgspec.json.decode(data, type=_MEMBERS)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _members(kind: type[msgspec.Struct]) -> set[str]:
    return set(kind.__struct_encode_fields__)
