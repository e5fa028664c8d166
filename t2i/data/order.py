"""The endless order of samples: a function of the seed and the position alone."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import torch

from t2i.data.groups import SampleGroups


class SampleOrder:
    """Samples in an endless order, `chunk` at a time from one bucket: pass after pass, each shuffled anew.

    Each bucket is a stream of its own, in which a pass shows every sample once. A pass over all buckets takes as many
    whole chunks of each as its stream has filled by then; what is left over begins the next pass. So every chunk is
    full, no sample is left out, and none comes again before all others of its bucket came. A bucket smaller than a
    chunk has its turn when several of its passes have filled one.

    Args:
        size: number of samples.
        chunk: samples in a row that are of one bucket. They are those of an optimizer step on all processes, so that
            the order depends neither on the number of processes nor on that of micro-batches.
        buckets: (N,), the bucket of each sample; None is one.
        groups: arrange the passes, without buckets; None shuffles all samples.
    """

    def __init__(
        self,
        size: int,
        chunk: int,
        seed: int,
        buckets: np.ndarray | None = None,
        groups: SampleGroups | None = None,
    ):
        assert buckets is None or groups is None, "`fit` refuses both"
        self.chunk, self.seed, self.groups = chunk, seed, groups
        # The samples of each stream; None: all samples, or those of `groups`
        self.members: list[np.ndarray | None] = [None]
        if buckets is not None:
            self.members = [np.flatnonzero(buckets == number) for number in np.unique(buckets)]
        whole = size if groups is None else len(groups)
        self.sizes = [whole if members is None else len(members) for members in self.members]
        self.arranged: list[tuple[int, list[int]]] = [(-1, [])] * len(self.members)  # last pass of each stream

    def count_chunks(self, passes: int) -> list[int]:
        """Return the number of chunks that each stream has filled after some passes."""
        return [passes * size // self.chunk for size in self.sizes]

    def iterate_chunks(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield the stream of each chunk, from the chunk `first` on, and the chunk's number within this stream."""
        # Find the pass of the first; each stream lacks less than a chunk of its share
        most = (first + len(self.sizes) + 1) * self.chunk // sum(self.sizes) + 1
        epoch = bisect_right(range(most + 1), first, key=lambda passes: sum(self.count_chunks(passes))) - 1
        skipped = first - sum(self.count_chunks(epoch))
        while True:
            # A pass: what each stream fills in it, with the streams shuffled
            numbers, counts = self.count_chunks(epoch), self.count_chunks(epoch + 1)
            streams = np.repeat(np.arange(len(counts)), np.subtract(counts, numbers))
            order = torch.randperm(len(streams), generator=torch.Generator().manual_seed(self.seed + epoch))
            for place, stream in enumerate(streams[order.numpy()].tolist()):
                if place >= skipped:
                    yield stream, numbers[stream]
                numbers[stream] += 1
            epoch, skipped = epoch + 1, 0

    def get_sample(self, stream: int, position: int) -> int:
        """Return the index of the sample at a position of a stream."""
        size, members = self.sizes[stream], self.members[stream]
        # Samples are asked for nearly in order: one pass of each stream is kept
        if position // size != self.arranged[stream][0]:
            self.arranged[stream] = position // size, self.arrange_pass(size, position // size)
        index = self.arranged[stream][1][position % size]
        return index if members is None else int(members[index])

    def arrange_pass(self, size: int, epoch: int) -> list[int]:
        """Return a pass over a stream of this size, in order."""
        if self.groups is not None:
            return self.groups.arrange_pass(self.seed, epoch)
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
