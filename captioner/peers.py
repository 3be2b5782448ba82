"""The timeout after which another process of a job counts as lost."""

import os
from datetime import timedelta

from captioner.errors import UserError

# A live process is silent for as long as its loader retries a request (5 minutes, see the shard cache);
# train/barriers.py is for work that takes one rank longer than the others.
PEER_SECONDS = 600.0
PEER_VARIABLE = "CAPTIONER_PEER_TIMEOUT_SECONDS"


def peer_timeout() -> timedelta:
    """How long another process may be silent. Raises UserError for an invalid value in the environment."""
    text = os.environ.get(PEER_VARIABLE, str(PEER_SECONDS))
    try:
        found = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        found = timedelta(0)
    if found <= timedelta(0):
        raise UserError(f"{PEER_VARIABLE} is {text!r}: give a number of seconds above 0")
    return found
