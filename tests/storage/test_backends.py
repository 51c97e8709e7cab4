"""The contract, over each backend, plain and under 20 % of failures."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.open import open_storage
from modelstore.storage.retry import RetryingStorage
from modelstore.testing.faults import FaultyStorage
from modelstore.testing.storage import StorageContract


def mended(storage: Storage) -> Storage:
    return RetryingStorage(FaultyStorage(storage, seed=7, failing=0.2), seed=7, sleep=lambda _: None)


class LocalContract(StorageContract):
    def leave_behind(self, storage: Storage) -> str:
        file = storage.path("a/x")
        assert file is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_name(".tmp-1-0123456789abcdef").write_bytes(b"half")
        return "a/.tmp-1-0123456789abcdef"


class TestLocal(LocalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "store")


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage(uuid.uuid4().hex)


@pytest.mark.s3
class TestObstore(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, s3_is_real: bool) -> Storage:
        self.races_are_fair = s3_is_real
        return open_storage(s3_url)


@pytest.mark.s3
class TestS3fs(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, s3_is_real: bool) -> Storage:
        pytest.importorskip("s3fs")
        self.races_are_fair = s3_is_real
        return open_storage(s3_url, engine="s3fs")


class TestFaultyLocal(LocalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return mended(LocalStorage(tmp_path / "store"))


class TestFaultyMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return mended(MemoryStorage(uuid.uuid4().hex))


@pytest.mark.s3
class TestFaultyObstore(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, s3_is_real: bool) -> Storage:
        self.races_are_fair = s3_is_real
        return mended(open_storage(s3_url))


@pytest.mark.s3
class TestFaultyS3fs(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, s3_is_real: bool) -> Storage:
        pytest.importorskip("s3fs")
        self.races_are_fair = s3_is_real
        return mended(open_storage(s3_url, engine="s3fs"))
