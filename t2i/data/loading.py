"""Batches of a data set, read by worker processes, in an order that is a function of the seed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from t2i.config import TrainConfig
from t2i.data.dataset import Batch, SampleDataset, SampleIndex
from t2i.data.groups import SampleGroups
from t2i.data.order import SampleOrder
from t2i.errors import InputError


class EndlessBatchSampler(Sampler[list[SampleIndex]]):
    """Endless batches in an order that is a function of the seed: pass after pass, each shuffled anew.

    The position in the data is one integer, the number of images that all processes have used. Every process takes
    its part of each global batch. A pass may end in the middle of a batch, so no image is ever left out.
    With groups, a pass has as many samples of each. With buckets, all samples of a step are of one.

    step_size: samples of a step on all processes, in whole global batches; None is one of them.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
        groups: SampleGroups | None = None,
        buckets: np.ndarray | None = None,
        step_size: int | None = None,
    ):
        self.batch_size, self.seed, self.position = batch_size, seed, position
        self.rank, self.world_size = rank, world
        self.order = SampleOrder(size, step_size or batch_size * world, seed, buckets, groups)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        step_size, share = self.order.chunk, self.batch_size * self.world_size
        step, first = divmod(self.position, step_size)
        for stream, chunk in self.order.iterate_chunks(step):
            for start in range(first, step_size, share):
                # The draw differs between passes and, in its upper bits, between runs of other seeds.
                yield [
                    (
                        self.order.get_sample(stream, chunk * step_size + place),
                        step * step_size + place + (self.seed << 48),
                    )
                    for place in range(start + self.rank, start + share, self.world_size)
                ]
            step, first = step + 1, 0


def iterate_batches(dataset: SampleDataset, num_workers: int, **order: Any) -> Generator[Batch, None, None]:
    """Yield endless batches of a data set; `order` holds the keyword arguments of `EndlessBatchSampler`.

    Closing the generator ends its workers. After an error they end when the generator is released.
    """
    sampler = EndlessBatchSampler(len(dataset), buckets=dataset.buckets, **order)
    # The sampler yields batches, and the data set returns each as a whole
    settings = {"num_workers": num_workers, "collate_fn": return_batch, "worker_init_fn": set_worker_signals}
    with shorten_worker_errors():
        with block_signals():
            loader = iter(DataLoader(dataset, batch_sampler=sampler, **settings))
        yield from loader


def iterate_fixed_batches(
    dataset: SampleDataset, config: TrainConfig, rank: int, world: int
) -> tuple[Generator[Batch, None, None], int]:
    """Return batches that are the same each time, and how many whole ones `validation_samples` fill on all processes.

    That is at least one. With buckets, a batch is no larger than the smallest, so that all take part.
    """
    count, buckets = min(len(dataset), config.validation_samples), dataset.buckets
    smallest = count if buckets is None else min(count, *np.unique(buckets, return_counts=True)[1].tolist())
    batch_size = max(1, min(config.batch_size, smallest // world))
    loader = iterate_batches(dataset, 0, batch_size=batch_size, seed=0, rank=rank, world=world)
    return loader, max(1, count // (batch_size * world))


@contextmanager
def block_signals() -> Iterator[None]:
    """Block SIGTERM and SIGINT while workers start, for the workers inherit the mask.

    A signal to the whole process group is meant for the parent, which has to save before its workers end.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_worker_signals(worker: int) -> None:
    """Let a worker end only by SIGTERM from its parent: multiprocessing ends its children with one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it the sender of a signal is unknown, and torch's handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for start methods that lose the mask
        threading.Thread(target=wait_for_parent_signal, daemon=True).start()


def wait_for_parent_signal() -> None:
    """Exit at the SIGTERM of the parent, or at any once the parent is gone."""
    # A fork server starts the worker but does not end it, so getppid() need not be the parent's id.
    parent, starter = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid and os.getppid() == starter:
        pass
    os._exit(0)


@contextmanager
def shorten_worker_errors() -> Iterator[None]:
    """Reduce an InputError to its message: that of a worker contains the traceback as text."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1]) from error


def return_batch(batch: Batch) -> Batch:
    """Return the batch as it is: the data set collates by itself."""
    return batch
