"""Tokens: who may read, write or administer which models. A file keeps their SHA-256 alone, so that who reads it has none.

A token has 256 bits or so of chance, so one round of SHA-256 hides it as well as a slow hash would.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import string
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from modelstore.errors import FormatError, NotFoundError
from modelstore.format.objects.decoding import prepared

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = ("read", "write", "admin")
_LETTERS = string.ascii_letters + string.digits
_LENGTH = 43  # letters after hf_: llama.cpp drops tokens with fewer than 34


class Token(msgspec.Struct, frozen=True):
    """A token as it is stored: its owner, its rights on models whose names start with a prefix, and its end."""

    id: str
    name: str
    role: Role
    sha256: str
    created: float
    prefixes: tuple[str, ...] = ()  # none: all models
    expires: float | None = None

    def allows(self, role: Role) -> bool:
        """Whether it may do what needs this role: write includes read, admin both."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def covers(self, model: str) -> bool:
        """Whether it is for this model."""
        return not self.prefixes or model.startswith(self.prefixes)


EVERYBODY = Token("", "anonymous", "admin", "", 0.0)  # where no tokens are asked for


class _Kept(msgspec.Struct, frozen=True):
    tokens: tuple[Token, ...] = ()


class TokenFile:
    """The tokens in a file. Changes by other processes take effect from the next request on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int], dict[str, Token]] | None = None

    def create(
        self, name: str, role: Role, prefixes: Sequence[str] = (), lifetime: float | None = None
    ) -> tuple[Token, str]:
        """Make a token; its text is given here and nowhere again."""
        secret = "hf_" + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        now = time.time()
        expires = now + lifetime if lifetime is not None else None
        token = Token(secrets.token_hex(4), name, role, _hash(secret), now, tuple(prefixes), expires)
        with self._changing() as tokens:
            tokens.append(token)
        return token, secret

    def revoke(self, id: str) -> Token:
        """Take a token away, by its id or its holder's name; `NotFoundError` if there is none, or several of that name."""
        with self._changing() as tokens:
            found = [token for token in tokens if token.id == id] or [token for token in tokens if token.name == id]
            if len(found) != 1:
                what = f"{len(found)} tokens are called {id!r}: name one by its id" if found else f"no token {id!r}"
                raise NotFoundError(f"{what}; 'modelstore token list' shows them", object=str(self.path))
            gone = found[0]
            tokens.remove(gone)
        return gone

    def all(self) -> tuple[Token, ...]:
        """All tokens, oldest first."""
        return tuple(sorted(self._tokens().values(), key=lambda token: token.created))

    def find(self, secret: str) -> Token | None:
        """The token with this text, None if there is none or it has expired."""
        token = self._tokens().get(_hash(secret))
        return token if token is not None and (token.expires is None or time.time() < token.expires) else None

    def _tokens(self) -> dict[str, Token]:
        """By hash: looking one up by the hash of what was sent tells nothing by the time it takes."""
        with self._lock:
            try:
                at = self.path.stat()
            except FileNotFoundError:
                return {}
            now = (at.st_mtime_ns, at.st_size, at.st_ino)
            if self._read is None or self._read[0] != now:
                self._read = now, {token.sha256: token for token in _parse(self.path)}
            return self._read[1]

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The tokens as they are, kept as they are left; one process at a time, and whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list(_parse(self.path)) if self.path.exists() else []
            yield tokens
            beside = self.path.with_name(f"{self.path.name}.new")
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(msgspec.json.format(msgspec.json.encode(_Kept(tuple(tokens)))) + b"\n")
                out.flush()
                os.fsync(out.fileno())
            beside.replace(self.path)


def _parse(path: Path) -> tuple[Token, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=prepared(_Kept)).tokens
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise FormatError(
            f"{path} is not a file of tokens ({error}): restore it, or make another", object=str(path)
        ) from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
