"""The one exception that a user is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used: one line that names the file and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
