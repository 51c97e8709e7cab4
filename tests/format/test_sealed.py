"""Small objects carry their digest: every changed bit is noticed, and those of earlier releases are read."""

from __future__ import annotations

import msgspec
import pytest

from modelstore.errors import FormatError
from modelstore.format.objects.sealed import seal, unseal


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """As records are."""

    number: int
    text: str = ""


class Later(msgspec.Struct, frozen=True):
    """As another release may write it."""

    number: int
    text: str
    more: list[int]


class Empty(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose members all have their defaults."""

    number: int = 0


NOTE = Note(7, "ü")


def test_what_is_sealed_comes_back() -> None:
    assert unseal(seal(NOTE), Note, "k") == NOTE
    assert unseal(seal(Empty()), Empty, "k") == Empty()


def test_every_flipped_bit_is_noticed_also_within_the_digest() -> None:
    data = seal(NOTE)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(FormatError, match="object k is not a valid record"):
                unseal(bytes(flipped), Note, "k")


def test_every_truncation_is_noticed() -> None:
    data = seal(NOTE)
    for n in range(len(data)):
        with pytest.raises(FormatError) as caught:
            unseal(data[:n], Note, "k")
        assert caught.value.object == "k"


@pytest.mark.parametrize("more", [b" ", b"\0", b"}", b"{}"])
def test_bytes_behind_the_digest_are_noticed(more: bytes) -> None:
    with pytest.raises(FormatError):
        unseal(seal(NOTE) + more, Note, "k")


def test_objects_of_earlier_releases_have_no_digest() -> None:
    assert unseal(msgspec.json.encode(NOTE), Note, "k") == NOTE


def test_members_of_later_releases_are_passed_over_where_the_digest_is_right() -> None:
    later = Later(7, "ü", [1, 2])
    assert unseal(seal(later), Note, "k") == NOTE
    with pytest.raises(FormatError, match="no digest, and a member 'more'"):
        unseal(msgspec.json.encode(later), Note, "k")


def test_the_error_says_what_it_was_to_be_and_what_to_do() -> None:
    with pytest.raises(FormatError, match=r"object k is not a valid journal \(it is empty\): remove it"):
        unseal(b"", Note, "k", what="journal", advice="remove it")
