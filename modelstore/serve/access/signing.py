"""Addresses that allow one upload: an LFS client sends no token there, so the address itself says what for, and how long."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass
from urllib.parse import urlencode

from modelstore.serve.refusals import RefusedError

LIFETIME = 3600.0  # seconds


@dataclass(frozen=True)
class Permit:
    """The permission of one address: to send this object, or one part of it, for this model."""

    model: str
    oid: str
    size: int
    part: int  # from 1; 0: the whole object, or the end of one in parts
    expires: int

    def query(self, key: bytes) -> str:
        """As the query of an address."""
        fields = {"model": self.model, "oid": self.oid, "size": self.size, "part": self.part, "expires": self.expires}
        return urlencode({**fields, "signature": self._signature(key)})

    def _signature(self, key: bytes) -> str:
        text = "\0".join(map(str, (self.model, self.oid, self.size, self.part, self.expires)))
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def permit(model: str, oid: str, size: int, part: int = 0) -> Permit:
    """A permit from now on."""
    return Permit(model, oid, size, part, int(time.time() + LIFETIME))


def allowed(query: dict[str, str], key: bytes) -> Permit:
    """The permission that a query carries; `RefusedError` (403) if it is forged or too old."""
    numbers = [query.get(name, "") for name in ("size", "part", "expires")]
    if all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers):
        found = Permit(query.get("model", ""), query.get("oid", ""), *map(int, numbers))
        same = hmac.compare_digest(found._signature(key).encode(), query.get("signature", "").encode())
        if same and time.time() < found.expires:
            return found
    raise RefusedError(403, "this address is not one that the server gave, or it has expired: ask for another")
