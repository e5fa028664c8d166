"""The order of samples with buckets: every one in turn, whole batches of one bucket, from any position on."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from t2i.config import TrainConfig
from t2i.data.dataset import SampleDataset
from t2i.data.loading import EndlessBatchSampler, format_validation_lines, iterate_fixed_batches, plan_fixed_batches
from t2i.data.order import SampleOrder

BUCKETS = np.array([0] * 13 + [1] * 8 + [2] * 3 + [5] * 1)[np.random.default_rng(3).permutation(25)]


def draw(steps: int, batch_size: int = 4, position: int = 0, world: int = 1, micro: int = 1, buckets=BUCKETS, seed=1):
    """The samples and draws of some steps: of each step its micro-batches, of these the processes' parts."""
    step_size = batch_size * world * micro
    samplers = [
        iter(
            EndlessBatchSampler(
                len(buckets), batch_size, seed, position, rank, world, buckets=buckets, step_size=step_size
            )
        )
        for rank in range(world)
    ]
    return [[[next(sampler) for sampler in samplers] for _ in range(micro)] for _ in range(steps)]


def flatten(steps):
    """As one list of keys for each step, in the order of their positions."""
    return [[key for batches in micro for row in zip(*batches) for key in row] for micro in steps]


def test_a_step_is_of_one_bucket_on_all_processes():
    for step in flatten(draw(60, batch_size=2, world=2, micro=2)):
        assert len({BUCKETS[index] for index, _ in step}) == 1 and len(step) == 8


def test_where_buckets_are_whole_steps_a_pass_shows_every_picture_once():
    buckets = np.repeat([0, 1, 2], [8, 4, 12])
    for part in range(5):
        steps = flatten(draw(6, batch_size=2, world=2, position=part * 24, buckets=buckets))
        assert sorted(index for step in steps for index, _ in step) == list(range(24))
    groups = [[buckets[step[0][0]] for step in flatten(draw(6, buckets=buckets, position=24 * i))] for i in range(5)]
    assert len({tuple(group) for group in groups}) > 1, "the buckets' turns are shuffled"


@pytest.mark.parametrize("chunk", [1, 4, 7, 30])
def test_no_picture_comes_again_before_all_others_of_its_bucket_came(chunk):
    """And after any number of passes each bucket has had its share, up to a step."""
    counts: Counter[int] = Counter()
    order = SampleOrder(len(BUCKETS), chunk, 0, BUCKETS)
    chunks = order.iterate_chunks(0)
    for passes in range(1, 40):
        for _ in range(sum(order.count_chunks(passes)) - sum(order.count_chunks(passes - 1))):
            stream, number = next(chunks)
            for position in range(number * chunk, (number + 1) * chunk):
                counts[order.get_sample(stream, position)] += 1
                members = [counts[int(index)] for index in np.flatnonzero(np.unique(BUCKETS)[stream] == BUCKETS)]
                assert max(members) - min(members) <= 1
        for bucket in np.unique(BUCKETS):
            members = np.flatnonzero(bucket == BUCKETS)
            seen = sum(counts[int(index)] for index in members)
            assert passes * len(members) - chunk < seen <= passes * len(members)


@pytest.mark.parametrize("position", [8, 12, 40, 204, 1000, 4004])
def test_the_order_goes_on_from_any_position(position):
    whole = flatten(draw(position // 4 + 30))
    assert flatten(draw(30, position=position)) == whole[position // 4 :]
    assert flatten(draw(30, position=position, seed=2)) != whole[position // 4 :]


def test_it_does_not_depend_on_the_processes_and_micro_batches():
    expected = flatten(draw(40, batch_size=8))
    for split in (
        {"batch_size": 4, "world": 2},
        {"batch_size": 4, "micro": 2},
        {"batch_size": 2, "world": 2, "micro": 2},
    ):
        assert flatten(draw(40, **split)) == expected
    # Within a step, too
    half = EndlessBatchSampler(25, 4, 1, position=12, buckets=BUCKETS, step_size=8)
    assert list(islice(iter(half), 3)) == [part for [part] in draw(40, batch_size=4, micro=2)[1]][1:] + [
        part for [part] in draw(3, batch_size=4, micro=2)[2]
    ]


def test_every_draw_is_another():
    keys = [key for step in flatten(draw(100)) for key in step]
    assert len({number for _, number in keys}) == len(keys) == 400


def test_one_bucket_is_the_order_without_buckets():
    plain = iter(EndlessBatchSampler(10, 3, seed=4, rank=1, world=2, position=18))
    one = iter(EndlessBatchSampler(10, 3, seed=4, rank=1, world=2, position=18, buckets=np.zeros(10), step_size=6))
    assert list(islice(plain, 20)) == list(islice(one, 20))


class Shapes(SampleDataset):
    """Samples of some buckets; a batch is its keys."""

    def __init__(self, buckets: np.ndarray | None, size: int = 0):
        self.numbers, self.size = buckets, size if buckets is None else len(buckets)

    def __len__(self):
        return self.size

    def __getitems__(self, keys):
        return keys

    def get_sample_key(self, index):
        return str(index)

    @property
    def buckets(self):
        return self.numbers


def test_validation_has_full_batches_of_each_shape_and_a_short_one():
    """A shape of one image costs one batch, and no sample counts more than another."""
    buckets, config = np.repeat([0, 1, 4], [300, 200, 1]), TrainConfig("x", batch_size=32, validation_samples=1000)
    dataset = Shapes(buckets)
    batches = list(iterate_fixed_batches(dataset, config, 0, 1))
    assert [len(keys) for keys, _ in batches] == [32] * 9 + [12] + [32] * 6 + [8] + [1]
    assert sum(weight for _, weight in batches) == pytest.approx(1)
    assert all(weight == len(keys) / 501 and len({buckets[i] for i, _ in keys}) == 1 for keys, weight in batches)
    assert sorted(index for keys, _ in batches for index, _ in keys) == list(range(501))
    assert format_validation_lines(dataset, config, 1) == []


def test_processes_share_every_batch_of_validation_evenly():
    config, dataset = TrainConfig("x", batch_size=2, validation_samples=1000), Shapes(np.repeat([0, 1, 4], [9, 7, 3]))
    parts = [list(iterate_fixed_batches(dataset, config, rank, 4)) for rank in range(4)]
    assert [[len(keys) for keys, _ in part] for part in parts] == [[2, 1]] * 4
    seen = [index for part in parts for keys, _ in part for index, _ in keys]
    assert len(set(seen)) == len(seen) == 12 and 4 not in dataset.buckets[seen]
    line = "validation leaves out 3 images, of shapes with fewer held-out images than the 4 processes"
    assert format_validation_lines(dataset, config, 4) == [line]
    # Where no shape has enough, the images of one repeat
    assert [len(keys) for keys in plan_fixed_batches(Shapes(np.array([0, 1, 1])), config, 4)] == [4]


@pytest.mark.parametrize(("size", "world", "most"), [(50, 1, 1000), (50, 3, 1000), (3, 1, 1000), (50, 2, 20)])
def test_without_shapes_validation_sees_the_whole_batches_of_the_first_pass(size, world, most):
    config = TrainConfig("x", batch_size=8, validation_samples=most)
    for rank in range(world):
        batches = list(iterate_fixed_batches(Shapes(None, size), config, rank, world))
        count = min(8, min(size, most) // world)
        expected = islice(
            EndlessBatchSampler(size, count, 0, rank=rank, world=world), min(size, most) // count // world
        )
        assert [keys for keys, _ in batches] == list(expected) and batches[0][1] == 1 / len(batches)
