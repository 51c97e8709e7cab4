"""Four readers of a model through a cluster, as a program: `python -m tests.cluster.link_readers STORE HOST:PORT`.

Says "began" when each has read it once; reads on until its input ends, and once more; then says what went wrong, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading

import torch

import modelstore as ms

READERS = 4


def main(url: str, address: str) -> None:
    wanted = ms.open(url).load("m")
    ms.open(url, cluster=address).prefetch("m")
    over, began = threading.Event(), threading.Barrier(READERS + 1)
    problems: list[str] = []
    sources: set[str] = set()

    def read() -> None:
        store = ms.open(url, cluster=address)
        assert store.cluster is not None
        store.cluster.session.here = list  # type: ignore[method-assign]  # all over the network, nothing from the node's own files
        first, last = True, False
        while not last:
            last = over.is_set()
            try:
                found = dict(store.stream("m"))
                if found.keys() != wanted.keys() or not all(torch.equal(found[name], wanted[name]) for name in wanted):
                    problems.append("wrong bytes")
            except Exception as error:
                problems.append(repr(error))
            if first:
                began.wait(60)
                first = False
        sources.update(name for name, nbytes in store.cluster.session.counts.bytes.items() if nbytes)

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    began.wait(120)
    print("began", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join(60)
    hang = sum(thread.is_alive() for thread in threads)
    print(json.dumps({"problems": problems[:3], "hang": hang, "sources": sorted(sources)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
