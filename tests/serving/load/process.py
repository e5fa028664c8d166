"""A `t2i serve` process, and what it takes of the machine."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Usage:
    """What a server and its workers take: bytes of memory, open files, threads, files in its temporary folder."""

    rss: int
    files: int
    threads: int
    temporary: int
    cpu_seconds: float


class ServerProcess:
    """A server of a model on a free port of this machine. Use it as a context manager; it is stopped by SIGTERM.

    options: of `t2i serve`.
    """

    def __init__(self, model: str, *options: str):
        self.folder = tempfile.TemporaryDirectory(prefix="t2i-load-")
        command = [sys.executable, "-m", "t2i", "serve", "--model", model, "--port", "0", *options]
        environment = os.environ | {"TMPDIR": self.folder.name, "OMP_NUM_THREADS": "1"}
        # A file, for nobody reads a pipe once the server runs
        self.log = Path(self.folder.name) / "output.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, env=environment)
        self.address = self.wait_for_address()
        self.host, self.port = "127.0.0.1", int(self.address.rsplit(":", 1)[1])

    def wait_for_address(self) -> str:
        """Return the address that the server prints when it listens."""
        while True:
            if found := re.search(r"http://\S+:\d+", self.log.read_text()):
                return found[0]
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode} before it listened")
            time.sleep(0.1)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self, timeout: float = 60.0) -> int:
        """End the server as an operator does, and return its exit status; it is killed if it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.folder.cleanup()

    def list_workers(self) -> list[psutil.Process]:
        """Return the processes that the server started and that run Python of this project."""
        return [child for child in psutil.Process(self.process.pid).children() if "spawn_main" in str(child.cmdline())]

    def measure_usage(self) -> Usage:
        main = psutil.Process(self.process.pid)
        processes = [main, *main.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return Usage(
            sum(process.memory_info().rss for process in processes),
            sum(process.num_fds() for process in processes),
            sum(process.num_threads() for process in processes),
            sum(1 for _ in Path(self.folder.name).rglob("*")),
            sum(time.user + time.system for time in times),
        )
