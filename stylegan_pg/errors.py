"""Exceptions with a message for the user, and the exit codes in which they end.

0: done; 1: a fault; 2: bad input or usage; 75: stopped on request, and the same command continues the run.
"""

DONE, FAULT, USAGE, TO_BE_CONTINUED = 0, 1, 2, 75


class UsageError(Exception):
    """Bad input or usage. The message names the thing and the remedy; the command ends with exit code 2."""


class RunError(Exception):
    """The run cannot go on for an outside reason, such as a full disk; the command ends with exit code 1."""


class PeersLost(RunError):  # noqa: N818 - it names what happened
    """A collective call failed: other ranks have ended, or are at another point of the program."""
