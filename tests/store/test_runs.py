"""Which bytes of packs are read at once."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.format.objects.record import pack_key
from modelstore.storage.memory import MemoryStorage
from modelstore.store.runs import PIECE, Span, read, runs

SPANS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 3 * PIECE), st.integers(0, 2 * PIECE)).map(
        lambda one: Span(one[0], one[1], one[1] + one[2])
    ),
    max_size=12,
)


@given(spans=SPANS)
def test_a_run_is_one_piece_of_one_pack_in_order(spans: list[Span]) -> None:
    found = list(runs(spans, lambda span: span))
    assert [span for run in found for span in run] == spans
    for run in found:
        assert len({span.pack for span in run}) == 1
        assert all(a.stop <= b.start for a, b in itertools.pairwise(run))
        assert len(run) == 1 or run[-1].stop - run[0].start <= PIECE


def test_what_follows_each_other_with_little_between_is_read_at_once() -> None:
    near = [Span("a", at, at + 100) for at in range(0, 1_000_000, 20_000)]
    assert list(runs(near, lambda span: span)) == [near]
    assert len(list(runs([Span("a", 0, 1), Span("a", 100_000, 100_001)], lambda span: span))) == 2


def test_the_bytes_of_a_run() -> None:
    storage, pack = MemoryStorage(uuid.uuid4().hex), "ab" * 32
    storage.put(pack_key(pack), [bytes(range(100))], 100)
    found = read(storage, [Span(pack, 10, 12), Span(pack, 12, 12), Span(pack, 20, 23)])
    assert [part.tobytes() for part in found] == [b"\x0a\x0b", b"", b"\x14\x15\x16"]
    with pytest.raises(CorruptionError):
        read(storage, [Span(pack, 90, 101)])
    with pytest.raises(NotFoundError):
        read(storage, [Span("cd" * 32, 0, 1)])
