"""How many files this process may have open at a time."""

from __future__ import annotations

import contextlib
import resource

from stylegan_pg.errors import UsageError

ENOUGH = 65536
REMEDY = "this process may not open so many files: `ulimit -n 4096` before the command allows more"


def open_files(needed: int) -> None:
    """Raise this process's limit as far as that is allowed without asking.

    Raises:
        UsageError: if it may still not have as many as `needed` open.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    higher = ENOUGH if most == resource.RLIM_INFINITY else min(most, ENOUGH)
    if limit != resource.RLIM_INFINITY and limit < higher:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (higher, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UsageError(
            f"this process may have {limit} files open (ulimit -n), and needs up to {needed}: run `ulimit -n 4096` "
            "before the command; where that is refused, the machine's administrator raises the limit "
            "(/etc/security/limits.conf, LimitNOFILE= of a service, --ulimit nofile= of a container)"
        )
