"""Exceptions with a message for the user, and the exit codes of commands.

0: success; 1: an error; 2: bad input or usage; 75: the run was stopped on request, and the same command resumes it.
"""

DONE, FAULT, USAGE, TO_BE_CONTINUED = 0, 1, 2, 75


class UsageError(Exception):
    """Bad input or usage. The message names the cause and the remedy; the command ends with exit code 2."""


class RunError(Exception):
    """The run cannot continue for an external reason, such as a full disk; the command ends with exit code 1."""


class PeersLost(RunError):  # noqa: N818 - it names an event
    """A collective call failed, because other ranks have ended or are executing another part of the program."""
