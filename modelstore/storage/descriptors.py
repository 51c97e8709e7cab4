"""Open files, kept for the next read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelstore.format.locks import Lock


class _File:
    """An open descriptor, and how many reads use it now; the last of them closes it once it is retired."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.readers = 0
        self.retired = False


class Descriptors:
    """A bounded cache of files open for reading, safe among threads.

    A descriptor is never closed while a read uses it. A file that was removed or replaced is noticed (it does not have a name
    left), and the file that is there now is opened instead. `opener` gives a descriptor of a file by its name.
    """

    def __init__(self, limit: int, opener: Callable[[str], int]) -> None:
        self._limit = limit
        self._open = opener
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def borrow(self, path: str) -> Iterator[int]:
        """A descriptor of a file, valid within the block; `OSError` if it cannot be opened."""
        file = self._take(path)
        try:
            yield file.descriptor
        finally:
            self._give_back(file)

    def forget_other(self, path: str, status: os.stat_result) -> None:
        """Read what has that status from now on: a file that was moved away still has a name, and is not what is there."""
        with self._lock:
            file = self._files.get(path)
            if file and not os.path.samestat(os.fstat(file.descriptor), status):
                self._retire(path)

    def close(self) -> None:
        """Close all that no read uses now, and the others when it ends."""
        with self._lock:
            for path in tuple(self._files):
                self._retire(path)

    def __del__(self) -> None:
        self.close()

    def _take(self, path: str) -> _File:
        with self._lock:
            if file := self._files.get(path):
                if os.fstat(file.descriptor).st_nlink:
                    self._files.move_to_end(path)
                    file.readers += 1
                    return file
                self._retire(path)
        opened = _File(self._open(path))  # outside the lock: a slow disk stops only this read
        opened.readers = 1
        with self._lock:
            if path in self._files:  # another thread was faster: ours serves this one read
                opened.retired = True
            else:
                self._files[path] = opened
                if len(self._files) > self._limit:
                    self._retire(next(iter(self._files)))
        return opened

    def _retire(self, path: str) -> None:
        file = self._files.pop(path)
        file.retired = True
        if not file.readers:
            os.close(file.descriptor)

    def _give_back(self, file: _File) -> None:
        with self._lock:
            file.readers -= 1
            if file.retired and not file.readers:
                os.close(file.descriptor)
