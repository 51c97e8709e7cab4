"""The ports of this machine that a Ray node listens at, and for whom: as the kernel reports them, so that they are certain."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LISTENS = "0A"


class Port(NamedTuple):
    """A listening socket: its port, its address, and the name of the process that has it."""

    port: int
    address: str
    process: str

    @property
    def is_open(self) -> bool:
        """Whether other machines reach it."""
        return not self.address.startswith(("127.", "::ffff:127.")) and self.address != "::1"


def ports_of(session: int) -> list[Port]:
    """The listening sockets of all processes of a session, as `setsid` makes one, in ascending order."""
    listening = dict(_listening())
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) != session:
                continue
            name = (process / "comm").read_text().strip()
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
                    if match and match[1] in listening:
                        found.add(Port(*listening[match[1]], name))
    return sorted(found)


def _listening() -> Iterator[tuple[str, tuple[int, str]]]:
    """(inode, (port, address)) of each listening socket."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS:
                    address, _, port = fields[1].partition(":")
                    yield fields[9], (int(port, 16), _address(address))


def _address(text: str) -> str:
    """An address as the kernel's tables have it: words of four bytes, each in the machine's own order."""
    words = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)
