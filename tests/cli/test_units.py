"""Sizes and times, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.cli.terminal import units
from modelstore.format.units import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        ("1.5KiB", 1536),
        ("1000000", 1_000_000),
        (" 7 B ", 7),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "0.1B", "1 GiBs", "1e9", "one", "1,5GB", "１GB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90),
        ("12h", 43_200),
        ("7d", 604_800),
        ("0", 0),
        ("1.5m", 90),
        ("0.5s", 0.5),
        ("7D", 604_800),
        (12, 12),
        (0.25, 0.25),
    ],
)
def test_durations_are_read(text: str, expected: int) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "soon", "9" * 400, "1e3s", "１h", "60"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (90_900_000, "90.9 MB"),
        (999_999_999, "1 GB"),
        (1_230_000_000_000, "1.23 TB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert units.size(count) == text


@given(st.integers(min_value=1, max_value=10**18))
def test_a_written_size_is_read_as_nearly_the_same(count: int) -> None:
    assert parse_size(units.size(count)) == pytest.approx(count, rel=0.006)


def test_times_and_shares_are_written() -> None:
    assert units.seconds(0.421) == "0.42 s"
    assert units.seconds(12.34) == "12.3 s"
    assert units.seconds(185.2) == "3 min 05 s"
    assert units.share(1, 3) == "33.3 %"
    assert units.share(0, 0) == "–"
    assert units.moment(None) == "–"
    assert units.moment(0).startswith(("1970", "1969"))
    assert units.moment("2026-11-01T12:00:00+00:00").startswith("2026-1")
    assert units.count(1, "chunk") == "1 chunk"
    assert units.count(2500, "chunk") == "2,500 chunks"
