"""Whether an address is a URL or a local path, or one that was mistyped: never a local folder named `s3:`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Of the protocols that people write; others are URLs, too, where they are followed by "://".
_PROTOCOLS = (
    "abfs|abfss|az|azure|dropbox|file|ftp|gcs|gdrive|gs|hdfs|hf|http|https|local|memory|oci|oss|r2|s3|s3a|s3n|sftp|smb|ssh|"
    "webdav|webhdfs"
)
_MISTYPED = re.compile(rf"({_PROTOCOLS}):(?!//)/?", re.IGNORECASE)


def is_url(address: str | os.PathLike[str]) -> bool:
    """Whether it is a URL. `ValueError` where it is neither a URL nor meant as a path, such as `s3:/bucket`."""
    text = os.fspath(address)
    if "://" in text:
        return True
    if found := _MISTYPED.match(text):
        rest = text[found.end() :]
        why = "" if isinstance(address, str) else " as a text, since a Path makes one slash of two"
        raise ValueError(
            f"invalid URL {text!r}: write {found[1].lower()}://{rest}{why}; a local path of that name is ./{text}"
        )
    return False


def local_path(address: str | os.PathLike[str]) -> Path | None:
    """The local path that an address is, `file://` ones among them; None for any other URL, `ValueError` as `is_url`."""
    text = os.fspath(address)
    if not is_url(address):
        return Path(text)
    scheme = text.partition("://")[0].lower()
    return Path(unquote(urlsplit(text).path)) if scheme in ("file", "local") else None
