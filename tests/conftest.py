"""What every test may use, and the order in which they run."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

pytest_plugins = ["tests.s3"]
pytest.register_assert_rewrite("modelstore.testing")

settings.register_profile("any machine", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("any machine")


if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell: tests of Ctrl-C, and processes, want it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: whoever runs the last one is then not waited for long."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
