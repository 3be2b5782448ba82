"""Image files to pixels."""

import logging
import warnings

_NO_OUTPUT = logging.NullHandler()


def silence_pillow() -> None:
    """Drop what Pillow warns and logs of damaged and of large images, which get errors of ours.

    For processes of our own: a program that uses the library decides for itself.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(_NO_OUTPUT)  # without a handler Python prints them
