"""Python programs in processes of their own that take 0.1 s to start: forks of one that has imported the libraries.

A program begins without any module of this project, ends as one of `python` does, and a signal or a fault ends it
alone. Tests of starting, of launchers, and of what libraries read when they are imported start a real `python`.
"""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SERVER = Path(__file__).with_name("server.py")
ADDRESS = "T2I_TESTS_FORKS_AT"  # the server's socket, also for programs that start programs
RUNNING: set["Fork"] = set()


class Fork:
    """One process. send_signal: nothing is sent to one that has ended. status: None while it runs."""

    def __init__(self, request: dict[str, Any], prints: tuple[int, int]):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ[ADDRESS])
        socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], prints)
        self.pid, self.status = self.read_number(), None
        RUNNING.add(self)

    def read_number(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            received = self.connection.recv(1)
            assert received, "the server of forks has ended"
            line += received
        return int(line)

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return the exit status, once it is there within some seconds."""
        if self.status is None and select.select([self.connection], [], [], seconds)[0]:
            self.status = self.read_number()
            self.connection.close()
            RUNNING.discard(self)
        return self.status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkedProgram:
    """A program that runs, with the methods of `subprocess.Popen` that tests need.

    arguments: what follows `python` on a command line. ranks: of a group in which each process runs the program; `pid`
    is that of rank 0, which alone gets signals. environment, folder: instead of those of the caller. prints: where
    output and errors go, as numbers of open files; by default both are kept. merged: errors are kept with the output.
    own_group: signals to the caller's group do not reach it.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        prints: tuple[int, int] | None = None,
        merged: bool = False,
        own_group: bool = False,
    ):
        start_server()
        self.arguments = list(map(str, arguments))
        self.kept = [] if prints else [open_unnamed_file() for _ in range(2)]
        for file in self.kept:
            weakref.finalize(self, os.close, file)
        prints = prints or (self.kept[0], self.kept[not merged])
        variables = dict(os.environ if environment is None else environment)
        request = {"arguments": self.arguments, "folder": str(folder or Path.cwd()), "paths": [str(ROOT)]}
        request["own_group"] = own_group
        port = find_free_port() if ranks > 1 else 0
        self.forks = []
        for rank in range(ranks):
            own = describe_rank(rank, ranks, port) if ranks > 1 else {}
            self.forks.append(Fork({**request, "environment": variables | own}, prints))

    @property
    def pid(self) -> int:
        return self.forks[0].pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it; of several ranks the first that is not 0."""
        statuses = [fork.status for fork in self.forks]
        return None if None in statuses else next((status for status in statuses if status), 0)

    def poll(self) -> int | None:
        for fork in self.forks:
            fork.poll()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        for fork in self.forks:
            if fork.poll(max(0, end - time.monotonic())) is None:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.returncode or 0

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end, and return what was printed as output and as errors."""
        self.wait(timeout)
        output, errors = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in self.kept)
        return output, errors

    def send_signal(self, number: int) -> None:
        self.forks[0].send_signal(number)

    def kill(self) -> None:
        for fork in self.forks:
            fork.send_signal(9)


def run_program(arguments: Sequence[object], timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does. options: of `ForkedProgram`."""
    program = ForkedProgram(arguments, **options)
    output, errors = program.communicate(timeout)
    return subprocess.CompletedProcess(program.arguments, program.returncode or 0, output, errors)


def popen_forked(command: list[str], process_group: int) -> ForkedProgram:
    """Stand in for `subprocess.Popen` with a command of `python`, whose program prints where this one does."""
    assert command[0] == sys.executable and process_group == 0
    return ForkedProgram(command[1:], prints=(1, 2), own_group=True)


def open_unnamed_file() -> int:
    number, path = tempfile.mkstemp()
    os.unlink(path)
    return number


def describe_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "FORK_LAUNCHED": 1}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(number) for name, number in numbers.items()} | place


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server() -> None:
    """Start the process that programs are forked from, unless it runs."""
    if ADDRESS in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="t2i-forks-")
    atexit.register(folder.cleanup)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder.name}/socket")
        listener.listen()
        command = [sys.executable, str(SERVER), str(listener.fileno())]
        # It reads to the end of its input, which comes with the end of the tests
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)
    atexit.register(server.kill)
    os.environ[ADDRESS] = f"{folder.name}/socket"


@atexit.register
def end_all() -> None:
    """Kill programs that a failed test left."""
    for fork in list(RUNNING):
        fork.send_signal(9)
