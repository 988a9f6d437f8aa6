"""The counter-based numbers equal Random123's, are uniform, and each depends only on its own index."""

import numpy as np
import pytest
from scipy import stats

from pipelines.philox import derive_key, permutation, philox, random_words, uniforms

# github.com/DEShawResearch/random123, tests/kat_vectors: counter, key and result of philox4x32 10.
_KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_words_are_random123s():
    for counter, key, answer in _KNOWN_ANSWERS:
        k0, k1 = _words(key)
        words = philox(np.array(_words(counter), np.uint32)[:, None], (k0, k1))
        assert words[:, 0].tolist() == _words(answer)


def test_counters_side_by_side_give_what_each_gives_alone():
    key = derive_key(1)
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 50), np.uint32)
    alone = [philox(counters[:, n : n + 1], key) for n in range(50)]
    np.testing.assert_array_equal(philox(counters, key), np.concatenate(alone, axis=1))


def test_an_indexs_numbers_do_not_depend_on_the_others():
    key, index = derive_key(3), np.array([5, 2**40, 0, 17])
    together = random_words(key, index, 9)
    for row, number in enumerate(index):
        np.testing.assert_array_equal(together[row], random_words(key, np.array([number]), 9)[0])


def test_every_index_has_its_own_numbers():
    index = np.array([0, 1, 2**31, 2**32, 2**32 + 1, 2**62])
    assert len(np.unique(random_words(derive_key(3), index, 4))) == 4 * len(index)


def test_an_indexs_numbers_do_not_depend_on_how_many_are_asked():
    key, index = derive_key(3), np.arange(6)
    longest = random_words(key, index, 36)
    for count in range(36):
        np.testing.assert_array_equal(random_words(key, index, count), longest[:, :count])


def test_uniforms_are_uniform():
    numbers = uniforms(derive_key(7), np.arange(5000), 8)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 0.001


def test_pairs_of_neighbouring_uniforms_fill_the_square_evenly():
    numbers = uniforms(derive_key(8), np.arange(20_000), 2)
    across = [numbers, np.stack([numbers[:-1, 0], numbers[1:, 0]], axis=1)]
    for pairs in across:
        counts, _, _ = np.histogram2d(*pairs.T, bins=10, range=[[0, 1], [0, 1]])
        assert stats.chisquare(counts.ravel()).pvalue > 0.01


def test_every_bit_of_a_word_is_a_fair_coin():
    words = random_words(derive_key(9), np.arange(10_000), 1)[:, 0]
    ones = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).sum(axis=0)
    assert min(stats.binomtest(int(count), 10_000).pvalue for count in ones) > 0.001


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_permutation_holds_every_number_once(size: int):
    np.testing.assert_array_equal(np.sort(permutation(derive_key(1, 2), size)), np.arange(size))


def test_every_order_of_four_is_as_likely():
    orders = [tuple(permutation(derive_key(0, number), 4)) for number in range(2400)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


def test_every_seed_and_path_has_its_own_key():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63]
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32,), (1, 2, 3), (3, 2, 1)]
    keys = {derive_key(seed, *path) for seed in seeds for path in paths}
    assert len(keys) == len(seeds) * len(paths)
