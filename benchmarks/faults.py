"""What readers notice when parts of a cluster fail: four stream a model on three nodes, with two copies of each chunk.

Every fault has a cluster, and readers in processes of their own, to itself. Two of the readers take what their node's
shared memory holds from there, two take everything over the network. Each wait for the next tensor is timed, each tensor
compared with what was saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row, Setting, fresh, skipped, wait_for_quiet

READERS = 4
TENSORS, SHAPE = 24, (2048, 1024)  # 100 MB in bf16
MEMORY = 1 << 30  # bytes of shared memory a node may take for chunks
BUDGET = "96MiB"  # of each reader: four threads
USE = 0.04  # seconds for which a reader uses a tensor: four at full speed would leave two cores nothing to mend with
BEFORE = 5.0  # seconds that are measured without a fault
AFTER = 2.0  # seconds that are measured when all is well again
LONGEST = 60.0  # seconds until all must be well again
FAULTS = {
    "killed_host": "a host killed",
    "killed_own_host": "the host of the readers' node killed",
    "killed_raylet": "a node's raylet killed",
    "stopped_node": "a node stopped (SIGSTOP)",
    "stopped_control": "the control plane stopped for 5 s",
    "killed_control": "the control plane killed and started again",
    "changed_memory": "a byte changed in every chunk in every host's memory",
    "evicted": "everything evicted",
    "full_memory": "shared memory full",
    "cut_link": "a node's link cut",
}


class Nodes:
    """Three Ray nodes on this machine, each with a host; what is done to them."""

    def __init__(self, url: str) -> None:
        import ray

        import modelstore as ms

        self.ray = ray
        self.store = ms.open(url, cluster="auto")
        self.here = ray.get_runtime_context().get_node_id()
        self.cluster: Any = None
        self.stopped: list[int] = []

    @contextlib.contextmanager
    @staticmethod
    def running(url: str, small: bool) -> Iterator[Nodes]:
        """A cluster that holds the model, two copies of each chunk; `small`: with room for little more in shared memory."""
        from modelstore.cluster.control import runtime
        from modelstore.cluster.control.nodes import NODE

        with tempfile.TemporaryDirectory(prefix="modelstore-gcs-") as folder:
            control = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder}  # outlives the control plane
            os.environ.update({"RAY_AUTH_MODE": "disabled", **NODE, **control})
            import ray
            from ray.cluster_utils import Cluster

            first = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args=first)
            settings = runtime.default_settings(memory=MEMORY, images=MEMORY, replicas=2)
            with contextlib.ExitStack() as stack:
                stack.callback(cluster.shutdown)
                for _ in range(2):
                    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
                ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
                stack.callback(ray.shutdown)
                if small:
                    stack.enter_context(mounted(settings.root, 2.2 * 2 * TENSORS * SHAPE[0] * SHAPE[1]))
                runtime.deploy(settings, hosts=3)
                stack.callback(runtime.undeploy, force=True)
                made = Nodes(url)
                made.cluster = cluster
                made.store.prefetch("m")
                stack.callback(made.go_on)
                yield made

    def go_on(self) -> None:
        """Let stopped processes run again."""
        while self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def hosts(self) -> list[Any]:
        """The members."""
        return list(self.store.cluster_status().hosts)

    def held(self) -> float:
        """Copies of the model that the hosts' memory holds."""
        found = sum(host.stats["tiers"]["memory"]["bytes"] for host in self.hosts() if host.stats)
        return found / self.store.describe("m").stored

    def pid(self, own: bool = False) -> int:
        """The process of this node's host, or of another one's."""
        from modelstore.cluster.network.calls import actor, host_name

        member = next(host.member for host in self.hosts() if (host.node == self.here) == own)
        return int(self.ray.get(actor(host_name(member)).pid.remote()))

    def other(self) -> Any:
        """A node that is not this process's."""
        return next(node for node in self.cluster.worker_nodes if node.node_id != self.here)

    def is_whole(self, hosts: int) -> bool:
        """Whether that many hosts answer, and hold two copies of everything."""
        now = self.hosts()
        return len(now) == hosts and all(host.stats for host in now) and self.held() >= 1.9


@contextlib.contextmanager
def mounted(root: str, size: float) -> Iterator[None]:
    """A cluster's folder in shared memory with a limit of its own. Wants to be root."""
    Path(root).mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size)},mode=700", "modelstore", root], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
        shutil.rmtree(root, ignore_errors=True)


# ---------------------------------------------------------------------- faults: each returns what must come true again


def killed_host(nodes: Nodes, own: bool = False) -> Callable[[], bool]:
    before = {host.member for host in nodes.hosts()}
    os.kill(nodes.pid(own), signal.SIGKILL)
    return lambda: {host.member for host in nodes.hosts()} != before and nodes.is_whole(3)


def killed_own_host(nodes: Nodes) -> Callable[[], bool]:
    return killed_host(nodes, own=True)


def killed_raylet(nodes: Nodes) -> Callable[[], bool]:
    os.kill(nodes.other().all_processes["raylet"][0].process.pid, signal.SIGKILL)
    return lambda: nodes.is_whole(2)


def stopped_node(nodes: Nodes) -> Callable[[], bool]:
    raylet = nodes.other().all_processes["raylet"][0].process.pid
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(raylet)], capture_output=True, text=True, check=True)
    nodes.stopped = [raylet, *map(int, children.stdout.split())]
    for pid in nodes.stopped:
        os.kill(pid, signal.SIGSTOP)

    def whole() -> bool:
        if nodes.is_whole(2):
            nodes.go_on()
        return not nodes.stopped

    return whole


def stopped_control(nodes: Nodes) -> Callable[[], bool]:
    gcs = nodes.cluster.head_node.all_processes["gcs_server"][0].process.pid
    os.kill(gcs, signal.SIGSTOP)
    time.sleep(5)
    os.kill(gcs, signal.SIGCONT)
    return lambda: nodes.is_whole(3)


def killed_control(nodes: Nodes) -> Callable[[], bool]:
    nodes.cluster.head_node.kill_gcs_server()
    time.sleep(2)
    nodes.cluster.head_node.start_gcs_server()
    return lambda: nodes.is_whole(3)


def changed_memory(nodes: Nodes) -> Callable[[], bool]:
    assert nodes.store.cluster is not None
    session = nodes.store.cluster.session
    for path in Path(session.settings.root).glob("*/??/*"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    return lambda: any(h.stats["wrong"] for h in nodes.hosts() if h.stats) and nodes.is_whole(3)


def evicted(nodes: Nodes) -> Callable[[], bool]:
    nodes.store.evict()
    return lambda: nodes.is_whole(3)


def full_memory(nodes: Nodes) -> Callable[[], bool]:
    assert nodes.store.cluster is not None
    session = nodes.store.cluster.session
    filler = Path(session.settings.root) / "filler"
    nodes.store.evict()
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    time.sleep(5)
    filler.unlink()
    return lambda: nodes.is_whole(3)


# ---------------------------------------------------------------------- readers


def tensors() -> dict[str, Any]:
    """The model: the same in every process."""
    import torch

    random = torch.Generator().manual_seed(0)
    names = [f"model.layers.{at}.mlp.up_proj.weight" for at in range(TENSORS)]
    return {name: (torch.randn(SHAPE, generator=random) * 0.02).to(torch.bfloat16) for name in names}


def read(url: str, address: str, remote: bool) -> None:
    """Stream the model until standard input ends; a line of JSON for each time, and one for all of it."""
    import torch

    import modelstore as ms

    wanted = tensors()
    store = ms.open(url, cluster=address, memory=BUDGET)
    assert store.cluster is not None
    session = store.cluster.session
    if remote:
        session.here = list  # type: ignore[method-assign]
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        waits, wrong, seen = [], 0, 0
        error = None
        stream = iter(())
        try:
            began = time.monotonic()
            stream = store.stream("m")
            while True:
                item = next(stream, None)
                waits.append((began, time.monotonic() - began))
                if item is None:
                    break
                seen += 1
                wrong += not torch.equal(item[1], wanted[item[0]])
                del item
                time.sleep(USE)
                began = time.monotonic()
        except Exception as problem:
            error = repr(problem)
            waits.append((began, time.monotonic() - began))
        if error is None and seen != len(wanted):
            error = f"{seen} of {len(wanted)} tensors"
        print(json.dumps({"waits": waits, "wrong": wrong, "error": error}), flush=True)
    counts = session.counts
    print(json.dumps({"hedged": counts.hedged, "suspected": counts.suspected, "found_wrong": counts.wrong}), flush=True)


class Readers:
    """The readers' processes, and what they say."""

    def __init__(
        self, url: str, address: str, before: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """`before`: words before their command, `environment`: theirs."""
        self.said: list[list[dict[str, Any]]] = [[] for _ in range(READERS)]
        self._processes = []
        self._threads = []
        for number in range(READERS):
            arguments = json.dumps({"url": url, "address": address, "remote": number % 2 == 1})
            command = [*before, sys.executable, "-m", "benchmarks.measure", "benchmarks.faults:read", arguments]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._processes.append(process)
            thread = threading.Thread(target=self._listen, args=(process, self.said[number]), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self, times: int) -> None:
        """Until each has read the model so many times more."""
        wanted = [len(said) + times for said in self.said]
        end = time.monotonic() + LONGEST
        while any(len(said) < count for said, count in zip(self.said, wanted, strict=True)):
            if time.monotonic() > end or any(process.poll() is not None for process in self._processes):
                raise RuntimeError("a reader ended, or hangs")
            time.sleep(0.05)

    def end(self) -> list[dict[str, Any]]:
        """What each says at the end, when it has read the model to its end."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for thread in self._threads:
            thread.join(LONGEST)
        for process in self._processes:
            process.kill()
            process.wait()
        return [said.pop() for said in self.said if said and "hedged" in said[-1]]

    @staticmethod
    def _listen(process: subprocess.Popen[str], said: list[dict[str, Any]]) -> None:
        assert process.stdout is not None
        said.extend(json.loads(line) for line in process.stdout if line.startswith("{"))


def fault(url: str, name: str) -> dict[str, Any]:
    """What readers noticed of one fault."""
    with Nodes.running(url, small=name == "full_memory") as nodes:
        readers = Readers(url, nodes.cluster.address)
        try:
            readers.wait(2)
            began = time.monotonic()
            time.sleep(BEFORE)
            struck = time.monotonic()
            mended = globals()[name](nodes)
            while not (whole := mended()) and time.monotonic() < struck + LONGEST:
                time.sleep(0.1)
            well = time.monotonic()
            time.sleep(AFTER)
            readers.wait(1)
        finally:
            counts = readers.end()
        return noticed(readers, counts, began, struck) | {"whole": whole, "seconds": well - struck}


def noticed(readers: Readers, counts: list[dict[str, Any]], began: float, struck: float) -> dict[str, Any]:
    """What the readers said, by when they said it: before and after the fault struck."""
    reads = [each for said in readers.said for each in said]
    waits = [(at, wait) for each in reads for at, wait in each["waits"]]
    before = [wait for at, wait in waits if at + wait > began and at < struck]
    since = [(wait, at - struck) for at, wait in waits if at + wait > struck]
    errors = [each["error"] for each in reads if each["error"]]
    return {
        "before": max(before, default=0.0),
        "slowest": max(since, default=(0.0, 0.0))[0],
        "late": [(round(at, 2), round(wait, 3)) for wait, at in sorted(since, reverse=True)[:8]],
        "reads": len(reads),
        "readers": len(counts),
        "failed": len(errors),
        "errors": errors[:3],
        "wrong": sum(each["wrong"] for each in reads),
        "load": os.getloadavg()[0],
        **{key: sum(count[key] for count in counts) for key in ("hedged", "suspected", "found_wrong")},
    }


def rows(setting: Setting) -> list[Row]:
    """One for each fault."""
    import modelstore as ms

    url = str(setting.folder / "faults")
    if not Path(url).exists():
        ms.open(url).save("m", tensors())
    made = []
    for name, words in FAULTS.items():
        work = f"4 readers on 3 nodes, slowest wait for a tensor: {words}"
        if name in ("full_memory", "cut_link") and os.geteuid() != 0:
            made.append(skipped(work, "the same without it", "≤ 1 s", "mounts, or makes networks: wants to be root"))
            continue
        with setting.alone():
            wait_for_quiet(setting.quiet)
            if name == "cut_link":
                found = fresh("benchmarks.faults_link:fault", url=url)
            else:
                found = fresh("benchmarks.faults:fault", url=url, name=name)
        met = found["slowest"] <= 1 and not found["failed"] and not found["wrong"] and found["readers"] == READERS
        problems = f"{found['failed']} failed, {found['wrong']} tensors wrong"
        mended = "both copies of everything there again" if found["whole"] else "copies still missing"
        note = f"{found['reads']} reads, {problems}; {mended} after {found['seconds']:.1f} s"
        ours, before = f"{found['slowest']:.2f} s", f"{found['before']:.2f} s"
        ratio = found["slowest"]
        made.append(Row(work, "the same without it", ours, before, ratio, "≤ 1 s", met, note, found))
    return made
