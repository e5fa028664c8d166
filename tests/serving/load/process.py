"""A `t2i serve` process, and what it takes of the machine."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil


@dataclass(frozen=True)
class Usage:
    """What a server and its workers take: bytes of memory, open files, threads, files in its temporary folder.

    temporary_bytes: of those files.
    """

    rss: int
    files: int
    threads: int
    temporary: int
    temporary_bytes: int
    cpu_seconds: float


class ServerProcess:
    """A server of a model on a free port of this machine. Use it as a context manager; it is stopped by SIGTERM.

    options: of `t2i serve`. cores: that its networks compute with; None are all.
    """

    def __init__(self, model: str, *options: str, cores: int | None = None):
        self.model = model
        self.http = httpx2.Client(timeout=60)
        self.folder = tempfile.TemporaryDirectory(prefix="t2i-load-")
        command = [sys.executable, "-m", "t2i", "serve", "--model", model, "--port", "0", *options]
        environment = os.environ | {"TMPDIR": self.folder.name}
        if cores is not None:
            environment["OMP_NUM_THREADS"] = str(cores)
        # A file, for nobody reads a pipe once the server runs
        self.log = Path(self.folder.name) / "output.txt"
        with self.log.open("w") as output:
            # In a group of its own, for signals that a terminal sends to all of its processes
            self.process = subprocess.Popen(command, stdout=output, env=environment, start_new_session=True)
        try:
            self.address = self.wait_for_address()
        except BaseException:
            self.stop()
            raise
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
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.folder.cleanup()

    def read_metric(self, name: str) -> float:
        """Return a metric of the server, of all models together; 0 if there is none."""
        text = self.http.get(f"{self.address}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def count_connections(self, ports: set[int]) -> int:
        """Return how many connections from these ports of clients the server holds."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port in ports for one in found)

    def reset_peak(self) -> None:
        """Begin anew with the most memory that the server's own process takes."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def read_peak(self) -> int:
        """Return the most bytes of memory that the server's own process took since `reset_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]

    def list_workers(self) -> list[psutil.Process]:
        return list_worker_processes(self.process.pid)

    def measure_usage(self) -> Usage:
        main = psutil.Process(self.process.pid)
        processes = [main, *main.children(recursive=True)]
        files = []
        for path in Path(self.folder.name).rglob("*"):
            with suppress(FileNotFoundError):  # it is gone already
                files.append(path.stat().st_size)
        times = [process.cpu_times() for process in processes]
        return Usage(
            sum(process.memory_info().rss for process in processes),
            sum(process.num_fds() for process in processes),
            sum(process.num_threads() for process in processes),
            len(files),
            sum(files),
            sum(time.user + time.system for time in times),
        )


def list_worker_processes(server: int) -> list[psutil.Process]:
    """Return the processes that a server started and that run Python of this project."""
    found = []
    for child in psutil.Process(server).children():
        with suppress(psutil.Error):  # it may have ended
            found += [child] if "spawn_main" in str(child.cmdline()) else []
    return found
