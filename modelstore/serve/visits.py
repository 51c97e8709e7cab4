"""A request while it is answered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelstore.serve.routes import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from modelstore.serve.access.tokens import Token


@dataclass
class Visit:
    """One request while it is answered: who asks for what, and what the log says of it in the end."""

    request: Request
    started: float = field(default_factory=time.monotonic)
    target: Route = field(default_factory=lambda: Route("unknown"))
    caller: Token | None = None
    status: int = 0
    sent: int = 0
    received: int = 0
    cut: bool = False

    @property
    def name(self) -> str:
        """The name whose limits count: a token's, else an address."""
        client = self.request.client
        return self.caller.id if self.caller is not None and self.caller.id else client.host if client else ""
