"""The `modelstore` command, and `python -m modelstore`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line and exit."""
    # Nothing is under way before the command runs, so Ctrl-C ends the process at once, without a traceback of imports.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from modelstore.cli.failures import INTERRUPTED, end_soon
    from modelstore.cli.main import main as run

    try:
        run()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            end_soon()
        raise


def end_at_once(*_: object) -> None:
    """What Ctrl-C does until a command begins, which puts a handler of its own in this one's place."""
    os._exit(130)


if __name__ == "__main__":
    main()
