import time
import tracemalloc

import numpy as np
import pytest

from pixart_data.duplicates import exact_duplicates, near_duplicates

ONE = np.uint64(1)


def random_hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def flipped(hashes, num_bits, generator):
    """The hashes with exactly that many bits flipped in each."""
    bits = generator.random((len(hashes), 64)).argsort(axis=1)[:, :num_bits].astype(np.uint64)
    return hashes ^ np.bitwise_xor.reduce(ONE << bits, axis=1)


def all_distances(hashes):
    return np.bitwise_count(hashes[:, None] ^ hashes[None, :]).astype(int)


@pytest.mark.parametrize("max_distance_bits", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 30, 600])
def test_near_duplicates_are_those_that_comparing_all_with_all_finds(count, max_distance_bits):
    generator = np.random.default_rng(count * 10 + max_distance_bits)
    families = random_hashes(max(1, count // 6), seed=count)
    hashes = generator.choice(families, count)
    for num_bits in (1, 2, 4):
        changed = generator.random(count) < 0.6
        hashes = np.where(changed, flipped(hashes, num_bits, generator), hashes)
    found = near_duplicates(hashes, max_distance_bits)
    distances = all_distances(hashes)
    expected = [bool((distances[i, :i] <= max_distance_bits).any()) for i in range(count)]
    assert (found >= 0).tolist() == expected
    [later] = np.nonzero(found >= 0)
    assert (found[later] < later).all()
    assert (distances[later, found[later]] <= max_distance_bits).all()
    if count == 600:
        assert 0 < sum(expected) < count


def test_the_distance_is_a_limit_to_the_bit():
    generator = np.random.default_rng(3)
    first = random_hashes(500)
    for num_bits in range(1, 8):
        hashes = np.concatenate([first, flipped(first, num_bits, generator)])
        for limit in (num_bits - 1, num_bits):
            found = near_duplicates(hashes, limit)[500:]
            assert (found >= 0).tolist() == [limit == num_bits] * 500
    assert found.tolist() == list(range(500))


def test_a_chain_leads_back_to_its_first():
    hashes = np.array([0b0, 0b11, 0b1111, 0b111111, 2**60 - 1], dtype=np.uint64)
    assert near_duplicates(hashes, 2).tolist() == [-1, 0, 1, 2, -1]


def test_crowds_of_equal_hashes_cost_no_more_than_others():
    """All with all among the 200,000 equal ones would be 20,000 million comparisons."""
    hashes = np.concatenate([random_hashes(1000), np.full(200_000, 7, dtype=np.uint64), random_hashes(1000, seed=5)])
    started_s = time.process_time()
    found = near_duplicates(hashes, 4)
    assert time.process_time() - started_s < 20
    assert found[1000] == -1
    assert set(found[1001:201_000].tolist()) == {1000}
    assert (found[201_000:] == -1).all()


def test_memory_grows_with_the_hashes_and_not_with_their_pairs():
    tracemalloc.start()
    try:
        near_duplicates(random_hashes(300_000), 4)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300_000 * 100


def test_exact_duplicates_need_all_bits():
    digests = random_hashes(2000).reshape(1000, 2)
    digests[500] = digests[20]
    digests[700] = digests[20]
    digests[800] = digests[21]
    digests[900, 0] = digests[30, 0]
    digests[901, 1] = digests[31, 1]
    found = exact_duplicates(digests)
    assert {i: int(j) for i, j in enumerate(found) if j >= 0} == {500: 20, 700: 20, 800: 21}


def test_no_digests_no_duplicates():
    assert exact_duplicates(np.zeros((0, 2), dtype=np.uint64)).tolist() == []
