"""The errors of this library: one line that a user can act on. Imports nothing of ours."""

from typing import Any

EXIT_PREEMPTED = 75  # "try again later" (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something that only the user can fix. The message is one line: what happened, and where.

    A subclass carries its data as attributes, and its `args` are the arguments of its `__init__`: it can be pickled.
    Command-line flags are named by commands only: see `remedies` of `captioner.cli.run`.
    """


class NotCalibratedError(UserError):
    """A model's confidence is asked for, and was not calibrated for captions of this decoding (DecodingDefaults)."""

    def __init__(self, decoding: object) -> None:
        super().__init__(decoding)
        self.decoding = decoding

    def __str__(self) -> str:
        return f"the model folder has no confidence calibrated for {self.decoding}"


class NoAttentionError(UserError):
    """Attention is asked for, and the model's decoder has none."""

    def __str__(self) -> str:
        return "the model's decoder has no attention to show: it reads one vector of an image"


class DeviceMemoryError(UserError):
    """A model's device has too little memory for so large a batch."""

    def __str__(self) -> str:
        return "the device has too little memory"


class StreamingError(UserError):
    """An argument, a state or data that captioner.streaming cannot work with."""


class TooManyBadSamplesError(StreamingError):
    """More samples of an epoch cannot be used than are tolerated; `last` says what is wrong with the last one."""

    def __init__(self, found: int, tolerated: int, last: str) -> None:
        super().__init__(found, tolerated, last)
        self.found, self.tolerated, self.last = found, tolerated, last

    def __str__(self) -> str:
        return f"{self.found} samples cannot be used, and {self.tolerated} are tolerated; the last: {self.last}"


class TransformError(Exception):
    """An exception in a function that was given to a loader: its name, the exception, and where it was (by name)."""

    def __init__(self, function: str, reason: str, where: dict[str, Any]) -> None:
        super().__init__(function, reason, where)
        self.function, self.reason, self.where = function, reason, where

    def __str__(self) -> str:
        places = ", ".join(f"{name} {value}" for name, value in self.where.items())
        return f"{self.function} failed at {places}: {self.reason}"
