from typing import NamedTuple


class Since(NamedTuple):
    position: int
    counts: tuple[int, ...]


class MixtureOrder:
    pass
