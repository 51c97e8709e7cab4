"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

_EDGES = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)  # seconds


class Metrics:
    """Counters of requests. May be used from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._times: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()
        self._sent = 0
        self._received = 0
        self._cut = 0
        self.running = 0

    def begin(self) -> None:
        """A request came."""
        with self._lock:
            self.running += 1

    def end(self, kind: str, status: int, seconds: float, sent: int, *, received: int = 0, cut: bool = False) -> None:
        """A request was answered; `cut`: its client had gone, or took nothing."""
        with self._lock:
            self.running -= 1
            self._requests[kind, status] += 1
            self._times.setdefault(kind, [0] * (len(_EDGES) + 1))[bisect_left(_EDGES, seconds)] += 1
            self._seconds[kind] += seconds  # type: ignore[assignment]  # a Counter adds floats as well
            self._sent += sent
            self._received += received
            self._cut += cut

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it in Prometheus' format, with gauges that others keep."""
        with self._lock:
            lines = ["# TYPE modelstore_http_requests_total counter"]
            for (kind, status), count in sorted(self._requests.items()):
                lines.append(f'modelstore_http_requests_total{{kind="{kind}",status="{status}"}} {count}')
            lines.append("# TYPE modelstore_http_request_seconds histogram")
            for kind, counts in sorted(self._times.items()):
                lines += _histogram(kind, counts, float(self._seconds[kind]))
            totals = {"sent_bytes": self._sent, "received_bytes": self._received, "cut_off": self._cut}
            for name, total in totals.items():
                lines += [f"# TYPE modelstore_http_{name}_total counter", f"modelstore_http_{name}_total {total}"]
            for name, value in {"http_running": self.running, **gauges}.items():
                lines += [f"# TYPE modelstore_{name} gauge", f"modelstore_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _histogram(kind: str, counts: list[int], seconds: float) -> list[str]:
    name, so_far, lines = "modelstore_http_request_seconds", 0, []
    for edge, count in zip((*map(str, _EDGES), "+Inf"), counts, strict=True):
        so_far += count
        lines.append(f'{name}_bucket{{kind="{kind}",le="{edge}"}} {so_far}')
    return [*lines, f'{name}_sum{{kind="{kind}"}} {seconds:.6f}', f'{name}_count{{kind="{kind}"}} {so_far}']
