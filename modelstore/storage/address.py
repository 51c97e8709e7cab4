"""Whether an address is a URL or a local path, or one that was mistyped: never a local folder named `s3:`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from modelstore.paths import from_home

# The protocols that people write; others are URLs, too, if they are followed by "://".
_PROTOCOLS = (
    "abfs|abfss|az|azure|dropbox|file|ftp|gcs|gdrive|gs|hdfs|hf|http|https|local|memory|oci|oss|r2|s3|s3a|s3n|sftp|smb|ssh|"
    "webdav|webhdfs"
)
_MISTYPED = re.compile(rf"({_PROTOCOLS}):(?!//)/?", re.IGNORECASE)


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*")
_FILE = ("file", "local")
_MACHINE = ("", "localhost")  # hosts of a file URL that stand for this machine


def is_url(address: str | os.PathLike[str]) -> bool:
    """Whether it is a URL. `ValueError` if it is neither a URL nor meant as a path, such as `s3:/bucket` or `://x`."""
    text = os.fspath(address)
    scheme, separator, rest = text.partition("://")
    if separator:
        if not _SCHEME.fullmatch(scheme.rpartition("::")[2] or scheme):
            raise ValueError(
                f"invalid URL {text!r}: {scheme!r} before '://' is not a protocol, write a folder, or a URL like s3://bucket/prefix"
            )
        return True
    if found := _MISTYPED.match(text):
        rest = text[found.end() :]
        why = "" if isinstance(address, str) else " as a text, since a Path makes one slash of two"
        slash = "/" * (found[1].lower() in _FILE)  # a path's own, after those of the URL
        raise ValueError(
            f"invalid URL {text!r}: write {found[1].lower()}://{slash}{rest}{why}; a local path of that name is ./{text}"
        )
    return False


def normal(address: str | os.PathLike[str]) -> str:
    """An address as a text, a URL's protocol in small letters; `ValueError` as `is_url`."""
    text = os.fspath(address)
    if not is_url(address):
        return text
    scheme, separator, rest = text.partition("://")
    return f"{scheme.lower()}{separator}{rest}"


def local_path(address: str | os.PathLike[str]) -> Path | None:
    """The local path that an address is, `file://` ones among them; None for any other URL, `ValueError` as `is_url`.

    Also where a `file://` URL names another machine, or no path, as `file://store` does.
    """
    text = normal(address)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return from_home(text)
    if scheme not in _FILE:
        return None
    host, slash, path = rest.partition("/")
    if "%00" in path:
        raise ValueError(f"invalid URL {text!r}: it has a character with the number 0, as no path has")
    if not slash or host not in _MACHINE:
        raise ValueError(
            f"invalid URL {text!r}: a path follows {scheme}:// with a slash of its own, as in {scheme}:///models; or write the "
            f"folder as it is"
        )
    return Path(unquote(slash + path))


def file_url(path: Path) -> str:
    """The URL of a local path, from which `local_path` gives it back."""
    return f"file://{path}".replace("%", "%25")
