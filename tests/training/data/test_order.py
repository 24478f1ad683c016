"""The order of samples: complete, reproducible, independent of how it is read."""

import numpy as np
import pytest

from training.data.order import Order, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, key=7)) == list(range(size))


def test_permute_works_on_sizes_that_do_not_fit_in_memory():
    out = permute(np.arange(1000), 10**12, key=3)
    assert len(set(out.tolist())) == 1000
    assert out.max() < 10**12
    assert abs(out.mean() / 10**12 - 0.5) < 0.05


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own():
    order = Order([100], seed=1)
    first, second = order.samples(0, 100), order.samples(100, 200)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)


def test_reading_in_pieces_gives_the_same_order():
    order = Order([37, 5], weights=[1, 2], seed=9)
    whole = order.samples(0, 300)
    pieces = np.concatenate([Order([37, 5], weights=[1, 2], seed=9).samples(i, i + 7) for i in range(0, 294, 7)])
    assert np.array_equal(whole[:294], pieces)


def test_seed_decides_the_order():
    assert not np.array_equal(Order([50], seed=1).samples(0, 50), Order([50], seed=2).samples(0, 50))


def test_without_shuffle_the_files_own_order_repeats():
    assert Order([3, 2], seed=1, shuffle=False).samples(0, 7).tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_weights_share_out_each_epoch_and_no_sample_comes_again_before_its_source_is_used_up():
    order = Order([30, 90], weights=[1, 1], seed=4)
    for epoch in range(3):
        epoch_samples = order.samples(epoch * 120, (epoch + 1) * 120)
        assert (epoch_samples < 30).sum() == 60
    small = [s for s in order.samples(0, 360) if s < 30]
    large = [s for s in order.samples(0, 360) if s >= 30]
    assert np.bincount(small).tolist() == [6] * 30
    assert np.bincount(large)[30:].tolist() == [2] * 90


def test_neighbours_in_the_data_are_not_neighbours_in_the_order():
    distance = np.abs(np.diff(Order([10_000], seed=5).samples(0, 10_000)))
    assert distance.mean() == pytest.approx(10_000 / 3, rel=0.05)  # the mean distance of two uniform draws


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        Order([0], seed=1)
