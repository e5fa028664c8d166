"""The order of samples with buckets: every one in turn, whole batches of one bucket, from any position on."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from t2i.data.loading import EndlessBatchSampler
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
