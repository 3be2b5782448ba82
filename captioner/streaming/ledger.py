"""Counts of the samples that were planned, read, decoded and skipped. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 5
READ_FIRST = ("shard missing", "shard damaged", "checksum")  # reasons why a sample could not be read


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that could not be used, by its position in the epoch, and why."""

    position: int
    reason: str
    message: str


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Counts of one rank's samples in an epoch, or since a resume in it.

    `repeated` samples pad the last batch; `dropped` ones are in a last batch that is left out.
    """

    planned: int = 0
    read: int = 0
    decoded: int = 0
    repeated: int = 0
    dropped: int = 0
    skipped: list[Skip] = field(default_factory=list)

    def count(self, found: Sequence[int], skipped: Sequence[Skip], *, planned: Sequence[int], num_samples: int) -> None:
        """Count a batch in an epoch of `num_samples`. Raises RuntimeError if it is not exactly what was planned."""
        if not skipped and found == list(planned) and (not planned or planned[-1] < num_samples):  # the usual case
            self.planned, self.read, self.decoded = (
                count + len(planned) for count in (self.planned, self.read, self.decoded)
            )
            return
        arrived = sorted([*found, *(skip.position for skip in skipped)])
        if arrived != list(planned):
            missing, strange = sorted(set(planned) - set(arrived)), sorted(set(arrived) - set(planned))
            raise RuntimeError(
                f"a batch of {len(planned)} samples has {len(arrived)}: positions {missing[:SHOWN]} are missing, "
                f"{strange[:SHOWN]} were not planned, the rest are duplicates"
            )
        repeated = sum(position >= num_samples for position in planned)
        self.planned += len(planned) - repeated
        self.repeated += repeated
        skipped = [skip for skip in skipped if skip.position < num_samples]
        self.decoded += sum(position < num_samples for position in found)
        self.read += len(planned) - repeated - sum(skip.reason in READ_FIRST for skip in skipped)
        self.skipped += skipped

    @classmethod
    def of_all(cls, ledgers: Sequence["Ledger"], *, planned: int) -> "Ledger":
        """The sum of all ranks' ledgers. Raises RuntimeError if it does not add up to the `planned` samples."""
        total = cls()
        for ledger in ledgers:
            for name in ("planned", "read", "decoded", "repeated", "dropped"):
                setattr(total, name, getattr(total, name) + getattr(ledger, name))
            total.skipped += ledger.skipped
        if not planned == total.planned + total.dropped or total.planned != total.decoded + len(total.skipped):
            raise RuntimeError(f"{planned} samples were planned, but the ledgers of all ranks say: {total}")
        return total

    def __str__(self) -> str:
        reasons = Counter(skip.reason for skip in self.skipped)
        details = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        skipped = f"{len(self.skipped):,} ({details})" if details else "0"
        dropped = f", dropped {self.dropped:,}" if self.dropped else ""
        return (
            f"planned {self.planned:,}, read {self.read:,}, decoded {self.decoded:,}, skipped {skipped}, "
            f"repeated {self.repeated:,}{dropped}"
        )
