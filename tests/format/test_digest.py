"""The one check of bytes against their digest."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from modelstore.format.digest import digest_of, matches, name_of, name_of_pieces

DATA = np.arange(10_000, dtype=np.uint8)


def test_bytes_match_their_own_digest_alone() -> None:
    digest = digest_of(DATA)
    assert digest == blake3(DATA.tobytes()).digest()
    assert matches(DATA, digest)
    assert matches(DATA.tobytes(), digest)
    for at in (0, 5_000, 9_999):
        flipped = DATA.copy()
        flipped[at] ^= 1
        assert not matches(flipped, digest)
    assert not matches(DATA[:-1], digest)
    assert not matches(b"", digest)


def test_pieces_have_the_name_of_the_whole() -> None:
    name = blake3(DATA.tobytes()).hexdigest()
    assert name_of(DATA) == name_of(DATA[:10], b"", DATA[10:].tobytes()) == name
    assert name_of_pieces(DATA[at : at + 999] for at in range(0, DATA.size, 999)) == name
