"""The deal of a global batch: nothing lost, equal turns, limits kept, loads even."""

import random

import pytest

from tests.support.training_fixtures import phase_of
from training.data.batching import BatchLimits, limits_for, partition_batch


def skewed(n, seed=0):
    rng = random.Random(seed)
    return [min(2000, int(rng.lognormvariate(4.5, 0.8)) + 2) for _ in range(n)]


CASES = [
    BatchLimits(micro_tokens=4096),
    BatchLimits(micro_tokens=4096, row_tokens=512),
    BatchLimits(micro_tokens=2048, row_tokens=2048),
    BatchLimits(micro_tokens=1, micro_batch=3),
    BatchLimits(micro_tokens=1, micro_batch=5, row_tokens=1024),
]


@pytest.mark.parametrize("limits", CASES)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [3, 8, 64])
def test_every_sample_is_dealt_once_in_equal_turns(limits, num_workers, batch):
    lengths = skewed(batch)
    hands = partition_batch(lengths, num_workers, limits)
    assert len(hands) == num_workers
    assert len({len(hand) for hand in hands}) == 1
    dealt = [sample for hand in hands for rows in hand for row in rows for sample in row]
    assert sorted(dealt) == list(range(batch))


@pytest.mark.parametrize("limits", CASES)
def test_a_micro_batch_keeps_its_limits(limits):
    lengths = skewed(200, seed=3)
    for hand in partition_batch(lengths, 4, limits):
        for rows in hand:
            if limits.micro_batch:
                assert sum(map(len, rows)) <= limits.micro_batch
            elif rows:
                longest = max(sum(lengths[i] for i in row) for row in rows)
                assert len(rows) * longest <= limits.micro_tokens or len(rows) == 1
            if limits.row_tokens:
                assert all(sum(lengths[i] for i in row) <= limits.row_tokens or len(row) == 1 for row in rows)


def test_workers_get_nearly_the_same_number_of_tokens():
    lengths = skewed(256, seed=1)
    loads = [
        sum(lengths[i] for rows in hand for row in rows for i in row)
        for hand in partition_batch(lengths, 8, BatchLimits(micro_tokens=4096))
    ]
    assert max(loads) < 1.02 * min(loads)


def test_packing_leaves_little_padding():
    lengths = skewed(256, seed=2)
    hands = partition_batch(lengths, 2, BatchLimits(micro_tokens=4096, row_tokens=2048))
    places = sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for hand in hands for rows in hand)
    assert sum(lengths) / places > 0.9


def test_a_worker_without_samples_still_takes_its_turns():
    hands = partition_batch([10, 10], 3, BatchLimits(micro_tokens=100))
    assert sorted(len(rows) for hand in hands for rows in hand) == [0, 1, 1]


@pytest.mark.parametrize("micro_batch", [None, 32])
def test_kernels_for_packed_rows_get_one_row_at_a_time(micro_batch):
    limits = BatchLimits(micro_tokens=2048, micro_batch=micro_batch, row_tokens=2048, one_row=True)
    assert all(len(rows) <= 1 for hand in partition_batch(skewed(200), 2, limits) for rows in hand)


@pytest.mark.parametrize(
    ("settings", "device", "attention", "longest", "expected"),
    [
        ({}, "cuda", "sdpa", 600, BatchLimits(micro_tokens=4096, row_tokens=600)),
        ({}, "cuda", "flash_attention_2", 600, BatchLimits(micro_tokens=4096, row_tokens=4096, one_row=True)),
        ({}, "cuda", "sdpa", 8192, BatchLimits(micro_tokens=8192, row_tokens=8192)),
        ({}, "cpu", "sdpa", 2048, BatchLimits(micro_tokens=1024, row_tokens=512)),
        ({}, "cpu", "sdpa", 100, BatchLimits(micro_tokens=1024, row_tokens=320)),
        ({}, "cpu", "sdpa_varlen", 2048, BatchLimits(micro_tokens=1024, row_tokens=1024, one_row=True)),
        ({"lora": {}}, "cpu", "sdpa_varlen", 2048, BatchLimits(micro_tokens=512, row_tokens=512, one_row=True)),
        ({"lora": {}}, "cpu", "sdpa", 2048, BatchLimits(micro_tokens=512, row_tokens=512)),
        ({"recipe": "reward"}, "cpu", "sdpa", 2048, BatchLimits(micro_tokens=512, row_tokens=512)),
        ({"micro_tokens": 2048}, "cpu", "sdpa", 2048, BatchLimits(micro_tokens=2048, row_tokens=512)),
        ({"data": {"pack": False}}, "cpu", "sdpa", 2048, BatchLimits(micro_tokens=1024)),
    ],
)
def test_what_is_left_open_fits_the_device(tiny, settings, device, attention, longest, expected):
    settings = {"recipe": "sft", "micro_batch": None, **settings}
    phase = phase_of(tiny, settings.pop("recipe"), **settings)
    assert limits_for(phase, longest, device, attention) == expected
