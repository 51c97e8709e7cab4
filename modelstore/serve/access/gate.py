"""The sender of a request, and their rights: every request passes here before anything of the store is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from modelstore.serve.access.tokens import EVERYBODY, Role, Token, TokenFile
from modelstore.serve.refusals import REPO, RefusedError, no_model
from modelstore.serve.routes import Route

_OPEN = frozenset({"health", "ready", "lfs-object"})  # the last by what its address is signed with
_WRITE = ("create", "preupload", "commit", "tag", "branch", "lfs-batch", "lfs-verify")
_NEEDS: dict[str, Role] = {"metrics": "admin", "delete": "admin", **dict.fromkeys(_WRITE, "write")}  # others: read


@dataclass(frozen=True)
class Gate:
    """Without tokens, everybody may do everything: for one machine's own use."""

    tokens: TokenFile | None

    def caller(self, authorization: str) -> Token | None:
        """The sender of this header; None for an unknown one, which is not an error yet. `RefusedError` (401) for a token that
        is none.
        """
        if self.tokens is None:
            return EVERYBODY
        if not authorization:
            return None
        scheme, _, secret = authorization.partition(" ")
        found = self.tokens.find(secret.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise RefusedError(
                401,
                "Invalid credentials in Authorization header",  # the words by which clients know it
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def check(self, caller: Token | None, target: Route) -> None:
        """`RefusedError` where a caller may not do that. A model that it may not know of is answered as one that is not there."""
        if target.kind in _OPEN:
            return
        role = _NEEDS.get(target.kind, "read")
        if caller is None:
            raise RefusedError(
                401,
                "this server asks for a token: set HF_TOKEN to one that 'modelstore token create' made",
                REPO if target.model else "",
                {"WWW-Authenticate": "Bearer"},
            )
        if target.model and not caller.covers(target.model):
            raise no_model(target.model)
        if not caller.allows(role):
            raise RefusedError(403, f"this token may {caller.role}, and that needs one that may {role}")
