"""The `modelstore` command, and `python -m modelstore`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line and exit."""
    from modelstore.cli.terminal.interrupts import INTERRUPTED, end_at_once

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from modelstore.cli.main import main as run
    from modelstore.cli.terminal.failures import end_soon

    try:
        run()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            end_soon()
        raise


if __name__ == "__main__":
    main()
