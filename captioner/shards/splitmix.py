"""Random bits and orders that are functions of their key alone, on any machine and under any version of any library.

Python and NumPy promise neither for their own shuffles: what they decide (which sample lies in which shard, and comes
when) would change with an update.
"""

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def random_bits(counters: np.ndarray, *key: int) -> np.ndarray:
    """64 random bits (uint64) for each counter, a function of key and counter alone: SplitMix64's output function."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part * GOLDEN + GOLDEN) & MASK))
    return _mix(state + counters.astype(np.uint64) * np.uint64(GOLDEN))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_integer(counter: int, *key: int) -> int:
    """`random_bits` of one counter, without NumPy, whose overhead would be most of the time."""
    state = 0
    for part in key:
        state = _mix_integer(state + part * GOLDEN + GOLDEN)
    return _mix_integer(state + counter * GOLDEN)


def _mix_integer(bits: int) -> int:
    bits &= MASK
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)


def random_order(length: int, *key: int) -> np.ndarray:
    """A permutation of `length` numbers, a function of the key alone."""
    return np.argsort(random_bits(np.arange(length), *key), kind="stable")
