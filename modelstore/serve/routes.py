"""The meaning of a request's path. Paths are read as they were sent: a revision is one segment, its slashes percent-encoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from modelstore.format.names import check_file, is_model
from modelstore.serve.refusals import ENTRY, REPO, RefusedError

_PLAIN = {
    "": "home",
    "health": "health",
    "ready": "ready",
    "metrics": "metrics",
    "api/models": "list",
    "api/changes": "changes",
    "api/whoami-v2": "whoami",
    "api/repos/create": "create",
    "api/repos/delete": "delete",
    "api/validate-yaml": "yaml",
    "api/lfs/object": "lfs-object",
}
# The word after a model's name below /api/models, and how many segments follow it at least and at most (None: any number).
_VERBS: dict[str, tuple[int, int | None]] = {
    "revision": (1, 1),
    "tree": (1, None),
    "refs": (0, 0),
    "commits": (1, 1),
    "paths-info": (1, 1),
    "preupload": (1, 1),
    "commit": (1, 1),
    "tag": (1, 1),
    "branch": (1, 1),
}

_LFS = {"info/lfs/objects/batch": "lfs-batch", "info/lfs/verify": "lfs-verify"}
READS = ("GET", "HEAD")
_POST = ("paths-info", "create", "yaml", "preupload", "commit", "branch", *_LFS.values())
METHODS: dict[str, tuple[str, ...]] = {  # of the kinds that are not read alone
    **dict.fromkeys(_POST, ("POST",)),
    "changes": ("GET",),
    "delete": ("DELETE",),
    "tag": ("POST", "DELETE"),
    "lfs-object": ("PUT", "POST"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """The requested object: `kind` chooses the answer; the rest is decoded, "" if the kind has none."""

    kind: str
    model: str = ""
    revision: str = ""
    path: str = ""


def parse_path(raw: bytes) -> Route:
    """The target of a path as it was sent, without its query; `RefusedError` if there is nothing of the kind.

    Example:
        >>> parse_path(b"/acme/llama/resolve/3%3Aint4/config.json")
        Route(kind='resolve', model='acme/llama', revision='3:int4', path='config.json')
    """
    segments = [_decoded(segment) for segment in raw.removeprefix(b"/").split(b"/")]
    plain = _PLAIN.get("/".join(segments))
    if plain is not None:
        return Route(plain)
    if segments[:2] == ["api", "models"]:
        return _of_api(segments[2:])
    for length in (2, 1):
        if len(segments) > length + 2 and segments[length] == "resolve":
            return _target("resolve", segments[:length], segments[length + 1], segments[length + 2 :])
        lfs = _LFS.get("/".join(segments[length:]))
        if lfs is not None and segments[length - 1].endswith(".git"):
            return _target(lfs, [*segments[: length - 1], segments[length - 1].removesuffix(".git")], "", ())
    raise RefusedError(404, "there is nothing at this path: see docs/serve.md for what is", ENTRY)


def _decoded(segment: bytes) -> str:
    try:
        text = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise RefusedError(400, "the path is not UTF-8: percent-encode it") from None
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise RefusedError(400, "the path has control characters: leave them out")
    return text


def _of_api(rest: Sequence[str]) -> Route:
    """The meaning of a path below /api/models: a model of one or two parts, and what of it."""
    for length in (1, 2):
        verb, after = rest[length : length + 1], rest[length + 1 :]
        if not verb or verb[0] not in _VERBS:
            continue
        least, most = _VERBS[verb[0]]
        if least <= len(after) and (most is None or len(after) <= most):
            return _target(verb[0], rest[:length], after[0] if after else "", after[1:])
    if len(rest) in (1, 2):
        return _target("revision", rest, "main", ())
    raise RefusedError(404, "there is nothing at this path: see docs/serve.md for what is", ENTRY)


def _target(kind: str, model: Sequence[str], revision: str, path: Sequence[str]) -> Route:
    name = "/".join(model)
    if not is_model(name):
        raise RefusedError(404, "this is no name of a model: names are NAME or ORG/NAME", REPO)
    where = "/".join(path).rstrip("/") if kind == "tree" else "/".join(path)
    if where:
        try:
            check_file(where)
        except Exception as error:
            raise RefusedError(404, f"no file {where[:80]!r}: it is not a plain relative path", ENTRY) from error
    return Route(kind, name, revision, where)
