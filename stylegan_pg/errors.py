"""The faults that are somebody's to mend, told apart by the exit code they end in (DESIGN: 0, 1, 2, 75)."""

DONE, FAULT, USAGE, TO_BE_CONTINUED = 0, 1, 2, 75


class UsageError(Exception):
    """Bad input or usage: the message names the thing and the remedy; the command ends with exit code 2."""


class RunError(Exception):
    """The run cannot go on for an outside reason (a full disk, ranks that drifted apart): exit code 1."""


class PeersLost(RunError):  # noqa: N818 - it names what happened
    """A collective call failed: the other ranks are gone, or no longer where this one is."""
