"""Distinguishes an object of a newer release from a damaged one: its format's number is read by itself."""

from __future__ import annotations

from typing import Annotated

import msgspec

from modelstore.errors import UnsupportedError
from modelstore.format.objects.decoding import prepared


class _Told(msgspec.Struct):
    format: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] | None = (
        None  # objects that had no such member so far may come to have it
    )


def check_format(text: bytes, reads: int, what: str, where: str) -> None:
    """`UnsupportedError` if JSON whose digest is right says that it has another format than the one that this release `reads`.

    To be called before, or where, its members are found to be others than expected. `what` names the object at the key `where`.
    """
    try:
        found = msgspec.json.decode(text, type=prepared(_Told)).format
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # it is not an object, or not JSON at all: the code that decodes it says so
    if found is not None and found != reads:
        raise UnsupportedError(
            f"{what} has format {found}, this release reads {reads}: it was made by a newer modelstore; use that",
            object=where,
        )
