"""Which addresses a cluster's hosts can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelstore.cluster.control.joining import source_of


@pytest.mark.parametrize("url", ["memory://x", "MEMORY://x", "Memory://x"])
def test_the_memory_of_one_process_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="lies in this process's memory"):
        source_of(url, None, None)


def test_folders_become_whole_paths_and_protocols_small_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of("store", None, None).url == str(tmp_path.resolve() / "store")
    assert source_of("S3://Bucket/x", None, None).url == "s3://Bucket/x"
