"""The token store: what is written is read, whole or not at all."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from training.data.token_store import ARRAYS, BAD_ROWS, META, StoreWriter, TokenStore, create


def sample(length: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(start, start + length, dtype=np.uint32)
    return ids, ids % 2 == 1


def fill(writer: StoreWriter) -> None:
    writer.add(*sample(4), source=0, part="a.jsonl", number=1)
    writer.add(*sample(7, start=100_000), source=0, part="b.jsonl", number=3)
    writer.add(*sample(2), source=2, part="c.jsonl", number=42)
    writer.meta.notes = ["a note"]


def turn_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path) -> TokenStore:
    with create(tmp_path / "cache/store", sources=3) as writer:
        fill(writer)
    return TokenStore.open(tmp_path / "cache/store")


def test_samples_come_back_as_they_went_in(store):
    assert len(store) == 3
    ids, targets = store[1]
    assert ids.tolist() == list(range(100_000, 100_007))
    assert targets.tolist() == [False, True, False, True, False, True, False]
    assert (ids.dtype, targets.dtype) == (np.int64, np.bool_)
    assert [len(ids) for ids, _ in store] == store.lengths.tolist() == [4, 7, 2]
    assert store.target_counts.tolist() == [2, 3, 1]


def test_a_sample_is_a_copy(store):
    store[0][0][:] = 9
    assert store[0][0].tolist() == [0, 1, 2, 3]


def test_arrays_are_mapped_and_read_as_plain_ones(store):
    """Slicing a memmap itself takes several times as long, for every sample of every step."""
    assert type(store.offsets) is np.ndarray
    assert isinstance(store.offsets.base, np.memmap)


def test_meta_counts_what_was_added(store):
    meta = store.meta
    assert (meta.kept, meta.tokens, meta.target_tokens, meta.notes) == (3, 13, 6, ["a note"])
    assert store.source_sizes == [2, 0, 1]


def test_a_sample_knows_its_row(store):
    assert [store.where(index) for index in range(3)] == ["a.jsonl:1", "b.jsonl:3", "c.jsonl:42"]


@pytest.mark.parametrize("index", [3, -1])
def test_there_is_no_sample_beyond_the_ends(store, index):
    with pytest.raises(IndexError):
        store[index]


def test_a_store_crosses_processes(store):
    assert pickle.loads(pickle.dumps(store))[1][0].tolist() == store[1][0].tolist()


def test_an_empty_store_can_be_opened(tmp_path):
    with create(tmp_path / "store", sources=1):
        pass
    assert len(TokenStore.open(tmp_path / "store")) == 0


def test_a_store_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with create(tmp_path / "store", sources=3) as writer:
            fill(writer)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_store_do_not_disturb_each_other(tmp_path):
    with create(tmp_path / "store", sources=3) as first:
        with create(tmp_path / "store", sources=3) as second:
            fill(first)
            fill(second)
        assert len(TokenStore.open(tmp_path / "store")) == 3
    assert TokenStore.open(tmp_path / "store")[1][0].tolist() == list(range(100_000, 100_007))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_file_cut_short_is_noticed(store):
    path = store.folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens.bin: expected 13 values"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("name", [*(f"{array}.bin" for array in ARRAYS), BAD_ROWS, META])
def test_a_turned_bit_is_found_in_every_file(tmp_path, name):
    with create(tmp_path / "store", sources=3) as writer:
        fill(writer)
        writer.add(*sample(2), source=2, part="c.jsonl", number=43, row=b'{"prompt": "1?"}')
        writer.add_bad("c.jsonl:44", "no completion")
    TokenStore.open(tmp_path / "store").verify()
    path = tmp_path / "store" / name
    turn_bit(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{name}: the content has changed since it was written|JSON|codec"):
        TokenStore.open(tmp_path / "store").verify()


@pytest.mark.parametrize("number", range(0, 900, 7))
def test_no_turned_bit_of_the_counts_is_taken_for_a_count(store, number):
    turn_bit(store.folder / META, number)
    with pytest.raises((ValueError, TypeError)):
        TokenStore.open(store.folder)


def test_writing_takes_no_memory_for_the_samples(tmp_path):
    ids, targets = sample(100)
    tracemalloc.start()
    try:
        with create(tmp_path / "store", sources=1) as writer:
            for number in range(20_000):
                writer.add(ids, targets, source=0, part="a.jsonl", number=number)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6  # the tokens alone are 8 MB
    assert len(TokenStore.open(tmp_path / "store")) == 20_000
