"""Groups of samples that are drawn equally often."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from t2i.config import DataConfig
from t2i.data.dataset import CaptionedPictures
from t2i.data.groups import SampleGroups, open_groups
from t2i.data.loading import EndlessBatchSampler
from t2i.errors import InputError

MEMBERS = [[0, 1, 2, 3], [4], [5, 6]]


def draw(count: int, groups: SampleGroups, position: int = 0) -> list[int]:
    sampler = EndlessBatchSampler(7, 2, seed=3, position=position, groups=groups)
    return [index for batch in islice(iter(sampler), count) for index, _ in batch]


def test_a_pass_has_one_of_every_group_and_members_take_turns():
    groups = SampleGroups(MEMBERS)
    assert len(groups) == 3
    passes = [groups.arrange_pass(seed=1, number=i) for i in range(8)]
    group_of = {index: number for number, members in enumerate(MEMBERS) for index in members}
    assert all(sorted(group_of[index] for index in part) == [0, 1, 2] for part in passes)
    # In eight passes each of four members comes twice, each of two four times, a single one always
    assert Counter(index for part in passes for index in part) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 8, 5: 4, 6: 4}
    assert len({tuple(part) for part in passes}) > 1, "passes are shuffled"


def test_neighbours_of_a_group_follow_each_other():
    groups = SampleGroups(MEMBERS, group_size=2)
    assert len(groups) == 5
    for number in range(6):
        order = groups.arrange_pass(seed=0, number=number)
        places = {index: place for place, index in enumerate(order)}
        assert abs(places[5] - places[6]) == 1 and 4 in places
        first, second = sorted(place for index, place in places.items() if index < 4)
        assert second == first + 1
    counts = Counter(index for number in range(4) for index in groups.arrange_pass(0, number) if index < 4)
    assert counts == {0: 2, 1: 2, 2: 2, 3: 2}


def test_the_order_is_a_function_of_seed_and_position():
    groups = SampleGroups(MEMBERS, group_size=2)
    whole = draw(20, groups)
    assert draw(20, groups) == whole
    assert draw(13, groups, position=14) == whole[14:]
    assert groups.compute_digest() != SampleGroups(MEMBERS).compute_digest()


def test_groups_come_from_a_column_of_labels(labelled: Path):
    data = DataConfig(str(labelled), 32, 0, balance_by="color")
    dataset = CaptionedPictures(data)
    groups = open_groups(data, dataset)
    assert groups is not None and sorted(sum(groups.members, [])) == list(range(len(dataset)))
    for members in groups.members:
        colors = {color for color in ("red", "green", "blue") for i in members if color in dataset.get_caption(i, 0)}
        assert len(colors) <= 1, "a group has one colour"
    assert open_groups(DataConfig(str(labelled), 32, 0), dataset) is None


def test_a_column_that_was_not_kept_is_refused(labelled: Path):
    data = DataConfig(str(labelled), 32, 0, balance_by="size")
    with pytest.raises(InputError, match="no column 'size'"):
        open_groups(data, CaptionedPictures(data))
    with pytest.raises(InputError, match="data.neighbours=2 needs data.balance_by"):
        DataConfig(str(labelled), 32, 0, neighbours=2)
