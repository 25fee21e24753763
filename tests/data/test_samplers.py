"""Order, groups, resumption and shares of batches."""

from collections import Counter
from itertools import islice

import pytest

from refbn_d2.data.samplers import GroupedBatchSampler


def batches(sampler, number):
    return list(islice(iter(sampler), number))


def test_without_groups_every_epoch_is_a_shuffle():
    sampler = GroupedBatchSampler([0] * 12, 4, seed=3)
    got = [pair for batch in batches(sampler, 9) for pair in batch]
    assert [draw for _, draw in got] == list(range(36))
    epochs = [[index for index, _ in got[i : i + 12]] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))
    assert batches(sampler, 9) == batches(GroupedBatchSampler([0] * 12, 4, seed=3), 9)
    assert batches(sampler, 9) != batches(GroupedBatchSampler([0] * 12, 4, seed=4), 9)


def test_groups_are_never_mixed_and_nobody_is_left_out():
    groups = ["a"] * 13 + ["b"] * 5 + [("c", 1)]
    got = batches(GroupedBatchSampler(groups, 4, seed=0), 200)
    for batch in got:
        assert len(batch) == 4 and len({groups[index] for index, _ in batch}) == 1
    counts = Counter(index for batch in got for index, _ in batch)
    drawn = 800 / len(groups)
    assert set(counts) == set(range(19))
    assert all(abs(count - drawn) <= 4 for count in counts.values())
    draws = [draw for batch in got for _, draw in batch]
    assert len(set(draws)) == len(draws)


def test_the_next_batch_is_the_one_that_is_full_first():
    """By the definition, on the stream of single images."""
    groups = [i % 3 for i in range(17)]
    stream = [batch[0] for batch in batches(GroupedBatchSampler([0] * 17, 1, seed=5), 500)]
    waiting, want = {0: [], 1: [], 2: []}, []
    for index, draw in stream:
        bucket = waiting[groups[index]]
        bucket.append((index, draw))
        if len(bucket) == 4:
            want.append(list(bucket))
            bucket.clear()
    assert batches(GroupedBatchSampler(groups, 4, seed=5), 100) == want[:100]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one(world_size):
    groups = [i % 2 for i in range(15)]
    whole = batches(GroupedBatchSampler(groups, 4, seed=1), 30)
    shares = [
        batches(GroupedBatchSampler(groups, 4, 1, rank, world_size), 30)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert all(len(part) == 4 // world_size for part in parts)
        assert sorted(pair for part in parts for pair in part) == sorted(batch)


@pytest.mark.parametrize("start", [1, 7, 40])
def test_it_goes_on_where_it_stopped(start):
    groups = [i % 3 for i in range(17)]
    whole = batches(GroupedBatchSampler(groups, 4, seed=2), 60)
    resumed = GroupedBatchSampler(groups, 4, seed=2, start_batch=start)
    assert batches(resumed, 60 - start) == whole[start:]


def test_repeats():
    plain = batches(GroupedBatchSampler([0] * 5, 1, seed=2), 10)
    got = batches(GroupedBatchSampler([0] * 5, 6, seed=2, repeats=3), 5)
    assert [i for batch in got for i, _ in batch] == [i for ((i, _),) in plain for _ in range(3)]
    assert [draw for batch in got for _, draw in batch] == list(range(30))  # augmented by this


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH = 6 .* over 4 worker.*4, 8, 12"):
        GroupedBatchSampler([0], 6, seed=0, world_size=4)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH = 0"):
        GroupedBatchSampler([0], 0, seed=0)
    with pytest.raises(ValueError, match="no image"):
        GroupedBatchSampler([], 4, seed=0)
    with pytest.raises(ValueError, match="seed .* is -1"):
        GroupedBatchSampler([0], 4, seed=-1)
