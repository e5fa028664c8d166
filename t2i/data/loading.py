"""Batches of a data set, read by worker processes, in an order that is a function of the seed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from t2i.config import TrainConfig
from t2i.data.dataset import Batch, SampleDataset, SampleIndex, iterate_equal_parts
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
) -> Iterator[tuple[Batch, float]]:
    """Yield a process's parts of `plan_fixed_batches`, and the fraction of all samples that each batch has."""
    batches = plan_fixed_batches(dataset, config, world)
    total = sum(map(len, batches))
    for keys in batches:
        yield dataset.__getitems__(keys[rank::world]), len(keys) / total


def plan_fixed_batches(dataset: SampleDataset, config: TrainConfig, world: int) -> list[list[SampleIndex]]:
    """Return batches of all processes that are the same each time: at least one, of at most `validation_samples`.

    Batches are full. With buckets, each of them ends with a short one, and samples that do not fill one on all
    processes are left out.
    """
    order, buckets = choose_fixed_samples(dataset, config), dataset.buckets
    numbers = np.zeros(len(order)) if buckets is None else buckets[order]
    size = min(config.batch_size, max(1, len(order) // world)) * world
    parts = list(iterate_equal_parts(numbers, size))
    # Each process has as many samples of a batch
    even = [part[: len(part) // world * world] for part in parts]
    batches = [part for part in even if len(part) == size or (len(part) and buckets is not None)]
    batches = batches or [np.resize(max(parts, key=len), world)]
    return [[(int(order[place]), int(place)) for place in part] for part in batches]


def choose_fixed_samples(dataset: SampleDataset, config: TrainConfig) -> np.ndarray:
    """Return the indices of the samples that validation sees, at most `validation_samples`, shuffled."""
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).numpy()[: config.validation_samples]


def format_validation_lines(dataset: SampleDataset | None, config: TrainConfig, world: int) -> list[str]:
    """Return lines about held-out images that are left out: by their shapes, and because shapes are too rare.

    A shape needs as many images as there are processes. Without a held-out split there are no lines.
    """
    if dataset is None:
        return []
    lines = dataset.format_left_out_lines()
    if dataset.buckets is None:
        return lines
    used = [dataset.buckets[keys[0][0]] for keys in plan_fixed_batches(dataset, config, world)]
    count = np.isin(dataset.buckets[choose_fixed_samples(dataset, config)], used, invert=True).sum()
    what = f"validation leaves out {count:,} images, of shapes with fewer held-out images than the {world} processes"
    return [*lines, what] if count else lines


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
