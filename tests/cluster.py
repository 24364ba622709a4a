"""A real Spark standalone cluster on this machine, for the tests that ask what local mode cannot show.

Local mode runs driver and tasks in one JVM: no executor can die there, GPU resources hang, stage-level profiles throw.
One master and two workers cost about 7 s on two idle cores. Everything is bound to 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
START_S = 60


@dataclass(frozen=True)
class Cluster:
    """A running cluster: `master` is its URL; each worker is the process of that id, the leader of its own session."""

    master: str
    workers: tuple[int, ...]

    def processes(self, worker: int) -> dict[int, str]:
        """What a worker has running now, itself, executors, Python workers and engines: process id → command line."""
        return _session(self.workers[worker])


@contextmanager
def cluster(folder: Path, workers: int = 2, cores: int = 1, gpus: int = 0) -> Iterator[Cluster]:
    """Starts a master and `workers` workers, logs and work folders below `folder`; ends them and all they started.

    Each worker declares `gpus` GPUs with made-up addresses: of two, worker 0 has "10" and "20", worker 1 "11" and "21".
    Workers have the environment of this process, so PYTHONPATH too. Raises RuntimeError with the logs if the cluster
    does not come up.
    """
    port, ui = _free_ports(2)
    master = f"spark://127.0.0.1:{port}"
    with ExitStack() as stack:
        words = ["--host", "127.0.0.1", "--port", str(port), "--webui-port", str(ui)]
        stack.enter_context(_daemon(folder / "master", "master.Master", words))
        started = []
        for n in range(workers):
            home = folder / f"worker{n}"
            words = ["--host", "127.0.0.1", "--webui-port", "0", "--cores", str(cores), "--memory", "3g"]
            words += ["--work-dir", str(home), master]
            options = _gpus(home, [f"{k}{n}" for k in range(1, gpus + 1)]) if gpus else ""
            started.append(stack.enter_context(_daemon(home, "worker.Worker", words, options)))
        _await_workers(f"http://127.0.0.1:{ui}/json/", workers, folder)
        yield Cluster(master, tuple(started))


@contextmanager
def _daemon(home: Path, name: str, words: list[str], worker_options: str = "") -> Iterator[int]:
    """A master or worker in a session of its own, so that whatever it starts can be found and ended with it."""
    home.mkdir(parents=True, exist_ok=True)
    ours = {"SPARK_HOME": str(SPARK_HOME), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOCAL_DIRS": str(home / "local")}
    ours["SPARK_WORKER_OPTS"] = worker_options
    others = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_SUBMIT_ARGS"))}
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{name}", *words],
            env={**others, **ours},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        # Python workers are process groups of their own, but they stay in the session.
        while left := _session(process.pid):
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.poll()
            time.sleep(0.05)


def _session(leader: int) -> dict[int, str]:
    """The living processes of a session: process id → command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace").strip()
        except OSError:
            continue
    return found


def _gpus(home: Path, addresses: list[str]) -> str:
    home.mkdir(parents=True, exist_ok=True)
    script = home / "gpus.sh"
    script.write_text(f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': addresses})}'\n")
    script.chmod(0o755)
    declared = {"amount": str(len(addresses)), "discoveryScript": str(script)}
    return " ".join(f"-Dspark.worker.resource.gpu.{key}={value}" for key, value in declared.items())


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _await_workers(url: str, wanted: int, folder: Path) -> None:
    until = time.monotonic() + START_S
    alive = 0
    while alive < wanted:
        if time.monotonic() > until:
            logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*/log")))
            raise RuntimeError(f"{alive} of {wanted} workers came up in {START_S} s\n{logs}")
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                alive = sum(worker["state"] == "ALIVE" for worker in json.load(answer)["workers"])
        except (OSError, ValueError):
            # Not listening yet; or it is, and answers without JSON until the master behind it is up (1 start of 20).
            continue
