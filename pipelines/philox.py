"""Counter-based random numbers: any element of any stream, without computing the earlier ones.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised. A number
depends only on its key and its index, so a plan or a view is the same on every worker and in every order.
NumPy's own generators are not used, because their streams may change between releases.
"""

import numpy as np
from jaxtyping import Float, Int, UInt32, UInt64

Key = tuple[int, int]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Hashes to draw at once.
_WORDS_AT_ONCE = 1 << 12


def philox(counter: UInt32[np.ndarray, "4 n"], key: Key) -> UInt32[np.ndarray, "4 n"]:
    """Four random words for each counter. Salmon et al. 2011, section 3.3."""
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = key
    low, shift = np.uint64(_WORD), np.uint64(32)
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> shift) ^ c1 ^ np.uint64(k0),
            right & low,
            (left >> shift) ^ c3 ^ np.uint64(k1),
            left & low,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def derive_key(seed: int, *path: int) -> Key:
    """A separate key for each (seed, path), such as (seed, epoch, lane, window)."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    for depth, part in enumerate(path):
        counter = np.array([[part & _WORD], [(part >> 32) & _WORD], [depth], [len(path)]], np.uint32)
        words = philox(counter, key)
        key = (int(words[0, 0]), int(words[1, 0]))
    return key


def random_words(key: Key, index: Int[np.ndarray, " n"], count: int) -> UInt32[np.ndarray, "n count"]:
    """`count` random words for each index, independent of the other indices."""
    index = np.asarray(index, np.uint64)
    low, high = index & np.uint64(_WORD), index >> np.uint64(32)
    blocks = -(-count // 4)
    block = np.arange(blocks, dtype=np.uint64)
    counter = np.empty((4, len(index), blocks), np.uint64)
    counter[0], counter[1], counter[2], counter[3] = low[:, None], high[:, None], block, 0
    words = philox(counter.reshape(4, -1).astype(np.uint32), key).reshape(4, len(index), blocks)
    return words.transpose(1, 2, 0).reshape(len(index), 4 * blocks)[:, :count]


def uniforms(key: Key, index: Int[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n count"]:
    """`count` float64 numbers in [0, 1) for each index, multiples of 2**-32."""
    return random_words(key, index, count) * 2.0**-32


def hashes(key: Key, index: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A random 64-bit word for each index, independent of the other indices."""
    words = np.empty(len(index), np.uint64)
    # In parts: millions at once would take ten times the memory and twice the time.
    for start in range(0, len(index), _WORDS_AT_ONCE):
        high, low = random_words(key, index[start : start + _WORDS_AT_ONCE], 2).astype(np.uint64).T
        words[start : start + len(high)] = (high << np.uint64(32)) | low
    return words


def permutation(key: Key, size: int) -> Int[np.ndarray, " size"]:
    """The numbers 0 to size - 1 in random order."""
    return np.argsort(hashes(key, np.arange(size)), kind="stable")
