"""Any sequence of operations, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
import uuid

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelstore.errors import CorruptionError, NotFoundError
from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage

# A key is never a folder of another, as in a file system: files end in '.x', folders do not.
KEYS = st.builds(
    lambda folders, name: "/".join([*folders, f"{name}.x"]),
    st.lists(st.sampled_from(["a", "b", "a-b", "é"]), max_size=3),
    st.sampled_from(["0", "1", "a", "-"]),
)
PREFIXES = st.sampled_from(["", "a/", "b/", "a/b/", "a-b/", "é/"])
DATA = st.binary(max_size=20)


class AgainstDict(RuleBasedStateMachine):
    storage: Storage

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, bytes] = {}

    @rule(key=KEYS, data=DATA)
    def create(self, key: str, data: bytes) -> None:
        assert self.storage.create(key, data) is (key not in self.model)
        self.model.setdefault(key, data)

    @rule(key=KEYS, pieces=st.lists(DATA, max_size=3))
    def put(self, key: str, pieces: list[bytes]) -> None:
        self.storage.put(key, pieces, sum(map(len, pieces)))
        self.model[key] = b"".join(pieces)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.storage.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS, start=st.integers(0, 25), size=st.integers(0, 25))
    def read(self, key: str, start: int, size: int) -> None:
        out = bytearray(size)
        if size and key not in self.model:
            with pytest.raises(NotFoundError):
                self.storage.read(key, start, memoryview(out))
        elif size and start + size > len(self.model[key]):
            with pytest.raises(CorruptionError):
                self.storage.read(key, start, memoryview(out))
        elif size:
            self.storage.read(key, start, memoryview(out))
            assert out == self.model[key][start : start + size]

    @rule(prefix=PREFIXES, limit=st.none() | st.integers(0, 5))
    def list(self, prefix: str, limit: int | None) -> None:
        expected = sorted((key, len(data)) for key, data in self.model.items() if key.startswith(prefix))[:limit]
        assert [(item.key, item.size) for item in self.storage.list(prefix, limit=limit)] == expected

    @rule(prefix=PREFIXES)
    def folders(self, prefix: str) -> None:
        below = [key[len(prefix) :] for key in self.model if key.startswith(prefix)]
        assert self.storage.folders(prefix) == tuple(sorted({key.split("/")[0] for key in below if "/" in key}))

    @invariant()
    def holds_the_same(self) -> None:
        assert {item.key: self.storage.get(item.key) for item in self.storage.list("")} == self.model


class LocalAgainstDict(AgainstDict):
    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="modelstore-test-")
        self.storage = LocalStorage(self.root)

    def teardown(self) -> None:
        shutil.rmtree(self.root)


class MemoryAgainstDict(AgainstDict):
    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage(uuid.uuid4().hex)


TestLocalAgainstDict = LocalAgainstDict.TestCase
TestMemoryAgainstDict = MemoryAgainstDict.TestCase
TestLocalAgainstDict.settings = TestMemoryAgainstDict.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None
)
