"""The errors of this library: one line that a user can act on. Imports nothing."""

EXIT_PREEMPTED = 75  # "try again later" (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something that only the user can fix. The message is one line: what happened, where, and what to do."""
