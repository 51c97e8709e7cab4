"""Ctrl-C before a command starts. Imports nothing, so that it is in place before all else is imported."""

from __future__ import annotations

import os

INTERRUPTED = 130  # the exit code


def end_at_once(*_: object) -> None:
    """Nothing is under way: end the process, without a traceback of imports. A command puts another handler in its place."""
    os._exit(INTERRUPTED)
