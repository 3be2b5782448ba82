"""Random bits and permutations that depend only on their key, on any machine and with any version of any library.

Python and NumPy promise this for none of their shuffles: with an update of theirs, samples would move to other shards
and positions.
"""

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def random_bits(counters: np.ndarray, *key: int) -> np.ndarray:
    """64 random bits (uint64) for each counter, a function of key and counter: SplitMix64's output function."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part * GOLDEN + GOLDEN) & MASK))
    return _mix(state + counters.astype(np.uint64) * np.uint64(GOLDEN))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_order(length: int, *key: int) -> np.ndarray:
    """A permutation of the numbers below `length`, a function of the key."""
    return np.argsort(random_bits(np.arange(length), *key), kind="stable")
