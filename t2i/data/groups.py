"""Groups of samples that training draws equally often, whatever their sizes: `data.balance_by`."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from t2i.config import DataConfig
from t2i.data.dataset import SampleDataset
from t2i.data.labels import read_labels
from t2i.data.manifest import find_manifest
from t2i.errors import InputError


@dataclass(frozen=True)
class SampleGroups:
    """Samples by group. A pass over the data has `group_size` members of every group, or all of a smaller one."""

    members: list[list[int]]  # indices of samples
    group_size: int = 1

    def __len__(self) -> int:
        """Return the number of samples in a pass."""
        return sum(min(len(members), self.group_size) for members in self.members)

    def arrange_pass(self, seed: int, number: int) -> list[int]:
        """Return the samples of a pass, in order: groups are shuffled, and members of one follow each other.

        Members of a group take turns from pass to pass: each comes once before one comes again.
        """
        order = torch.randperm(len(self.members), generator=torch.Generator().manual_seed(seed + number)).tolist()
        return [index for group in order for index in self.choose_members(group, seed, number)]

    def choose_members(self, group: int, seed: int, number: int) -> list[int]:
        """Return the members of a group in a pass."""
        members = self.members[group]
        count = min(len(members), self.group_size)
        if count == len(members):
            return members
        # Turns count over all passes; each round of turns has a permutation of its own
        chosen = []
        for turn in range(number * count, (number + 1) * count):
            turns, place = divmod(turn, len(members))
            chosen.append(random.Random(f"{seed} {group} {turns}").sample(members, len(members))[place])
        return chosen

    def compute_digest(self) -> str:
        """Return 16 hexadecimal digits of the groups."""
        return hashlib.sha256(json.dumps([self.members, self.group_size]).encode()).hexdigest()[:16]


def open_groups(data: DataConfig, dataset: SampleDataset) -> SampleGroups | None:
    """Return the groups of a data set by the column `data.balance_by`; None if it is not set.

    Raises InputError for a column that was not kept, or a sample without a value.
    """
    if data.balance_by is None:
        return None
    if dataset.buckets is not None:
        raise InputError(
            "data.balance_by does not go with data.buckets, which decide what is in a batch; leave one out"
        )
    labels = read_labels(find_manifest(Path(data.path)), data.balance_by)
    members: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        key = dataset.get_sample_key(index)
        if key not in labels:
            raise InputError(f"data.balance_by={data.balance_by!r}: {key!r} has no value; run `t2i data check` again")
        members.setdefault(labels[key], []).append(index)
    return SampleGroups(list(members.values()), 1 + data.neighbours)
