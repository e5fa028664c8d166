"""Training in two processes with a thread each (DDP over gloo) against one with one thread: 2 would be perfect.

All are started once, each on a core of its own where there are two, and take turns: while one kind runs, the others
wait. What the machine itself allows is measured the same way: with two that train by themselves, which exchange nothing
and have only caches and memory in common, and with products of matrices; and what exchanging gradients takes alone.
On GPUs, `accelerate launch -m benchmarks.training_step` tells the rate of as many as there are.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from benchmarks.side_by_side import Ratio, Row, Times, alternate, ratio, row, run
from benchmarks.training_step import made_up_steps
from t2i.errors import InputError
from t2i.networks.linear import is_onednn_faster, multiply_by_onednn

STEPS = 6  # a turn: less is mostly noise
WARM_UP = 20  # until captions of most lengths were met, and memory for them is held
PRODUCTS = 12  # of 2048 x 2048
PATIENCE = 600  # seconds for a turn; the first has imports and the warm-up


def main(quick: bool) -> list[Row]:
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise InputError("two processes need two cores, and a system that gives each its own")
    if quick:
        return [processes("prior", "tiny", 1)]
    return [processes(name, "emoji", 9) for name in ("prior", "decoder")]


def processes(name: str, folder: str, rounds: int) -> Row:
    """Seconds of as many samples, in two processes and in one: weights and batch of a process alike."""
    path = f"configs/{folder}/{name}.yaml"
    cores = sorted(os.sched_getaffinity(0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    two = [
        Trainer(path, core, {"RANK": rank, "WORLD_SIZE": 2}, port) for rank, core in enumerate((cores[0], cores[-1]))
    ]
    alone = [Trainer(path, core, {}, port) for core in (cores[0], cores[-1])]
    one = alone[:1]
    try:
        for trainers in (two, alone):  # not at once: the first to be ready would wait for the others all the same
            turn(trainers, "ready")()
        works = {"ours": turn(two, "steps"), "one process": turn(one, "steps"), "no exchange": turn(alone, "steps")}
        times = alternate(works, rounds)
        products = alternate({"ours": turn(alone, "products"), "one process": turn(one, "products")}, rounds)
        exchange = alternate({"ours": turn(two, "exchange")}, rounds).median("ours")
    finally:
        for trainer in (*two, *alone):
            trainer.end()
    title = f"{name} training, two processes of a thread each, {STEPS} steps' samples"
    limits = f"two that exchange nothing: {limit(times, 'no exchange')}; products of matrices: {limit(products)}"
    share = exchange / times.median("ours")
    limits += f"; of their time, exchanging as many gradients takes {share:.1%} by itself"
    note = f"{path}, fp32, its batch in each process, DDP over gloo; {limits}"
    return row(title, halved(times), 1.7, note=note)


def halved(times: Times, two: str = "ours") -> Times:
    """Two processes against the one, which had half their samples: seconds of as many."""
    one = "one process"
    return Times({"ours": [seconds / 2 for seconds in times.seconds[two]], one: times.seconds[one]})


def limit(times: Times, two: str = "ours") -> Ratio:
    return ratio(halved(times, two), "one process")


class Trainer:
    """A process that trains on one core when it is told to."""

    def __init__(self, path: str, core: int, place: dict[str, int], port: int):
        several = (
            place | {"LOCAL_RANK": place["RANK"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if place else {}
        )
        told = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true", **several}
        settings = os.environ | {name: str(value) for name, value in told.items()}
        command = [sys.executable, "-m", "benchmarks.training_processes", path, str(core)]
        who = f"rank {place['RANK']} of {place['WORLD_SIZE']}" if place else "one alone"
        self.name = f"{who} on core {core}"
        self.process = subprocess.Popen(command, bufsize=0, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.told, self.answers = self.process.stdin, self.process.stdout

    def ask(self, what: str) -> None:
        with suppress(BrokenPipeError):  # of one that ended, as whoever waits for it will find
            self.told.write(f"{what}\n".encode())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def wait(trainers: list[Trainer]) -> None:
    """Until all are done. Raises RuntimeError once one has ended, or where they are not done in time.

    All are looked at together, for where one ends another may wait for it in vain.
    """
    said = {trainer.answers: b"" for trainer in trainers}
    names = {trainer.answers: trainer.name for trainer in trainers}
    waited_for, deadline = set(said), time.monotonic() + PATIENCE
    while waited_for:
        ready = select.select(list(waited_for), [], [], max(0, deadline - time.monotonic()))[0]
        if not ready:
            late = ", ".join(names[one] for one in said if one in waited_for)
            raise RuntimeError(f"not done within {PATIENCE} s: {late}")
        for one in ready:
            part = os.read(one.fileno(), 2**16)
            if not part:
                raise RuntimeError(f"a process of the benchmark ended, {names[one]}; its message is above")
            said[one] += part
            if b"done" in said[one].splitlines() and said[one].endswith(b"\n"):  # besides what libraries print
                waited_for.remove(one)


def turn(trainers: list[Trainer], what: str) -> Callable[[], None]:
    def work() -> None:
        for trainer in trainers:
            trainer.ask(what)
        wait(trainers)

    return work


def obey(path: str, core: int) -> None:
    """What a process does: a turn for each line that it reads."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    step = made_up_steps(path, ["train.mixed_precision=no"], lambda i: 5 + i % 16)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    multiply = multiply_by_onednn if is_onednn_faster(a, b) else torch.matmul
    gradients = torch.zeros(sum(one.numel() for one in step.state.model.parameters()))
    works = {
        "ready": (step, WARM_UP),
        "steps": (step, STEPS),
        "products": (lambda: multiply(a, b), PRODUCTS),
        "exchange": (lambda: torch.distributed.all_reduce(gradients), STEPS),
    }
    for line in sys.stdin:
        work, count = works[line.strip()]
        for _ in range(count):
            work()
        print("done", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        obey(sys.argv[1], int(sys.argv[2]))
    else:
        run("training_processes", main)
