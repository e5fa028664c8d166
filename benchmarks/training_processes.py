"""Training in two processes with a thread each (DDP over gloo) against one with one thread: 2 would be perfect.

On a CPU; on GPUs, `accelerate launch -m benchmarks.training_step` tells the rate of as many as there are.
"""

import json
import os
import shutil
import subprocess
import sys

from benchmarks.side_by_side import Row, Times, row, run
from t2i.errors import InputError


def main(quick: bool) -> list[Row]:
    if shutil.which("taskset") is None or len(os.sched_getaffinity(0)) < 2:
        raise InputError("two processes need two cores, and `taskset` to give each its own")
    if quick:
        return [processes("prior", "tiny", 1)]
    return [processes(name, "emoji", 2) for name in ("prior", "decoder")]


def processes(name: str, folder: str, rounds: int) -> Row:
    """Seconds a sample of two processes with a thread each, against one: weights and batch a process alike."""
    seconds: dict[str, list[float]] = {"ours": [], "one process": []}
    for i in range(rounds):
        for way, count in [("ours", 2), ("one process", 1)][:: 1 if i % 2 else -1]:
            seconds[way].append(1 / samples_per_second(f"configs/{folder}/{name}.yaml", count))
    title = f"{name} training, two processes of a thread each, seconds a sample"
    note = f"configs/{folder}/{name}.yaml, its batch in each process, DDP over gloo"
    return row(title, Times(seconds), 1.7, note=note)


def samples_per_second(path: str, count: int) -> float:
    """What `benchmarks.training_step` says of a configuration in so many processes, each on a core."""
    program = ["-m", "benchmarks.training_step", path, "train.mixed_precision=no"]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *(several if count > 1 else []), *program, "--steps", "3"]
    cores = sorted(os.sched_getaffinity(0))[:count]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["samples_per_second"]


if __name__ == "__main__":
    run("training_processes", main)
