"""The `modelstore` command, and `python -m modelstore`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line and exit."""
    # Nothing is under way before the command runs, so Ctrl-C ends the process at once, without a traceback of imports.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from modelstore.cli.failures import INTERRUPTED, end_soon
    from modelstore.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    try:
        run()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            end_soon()
        raise


if __name__ == "__main__":
    main()
