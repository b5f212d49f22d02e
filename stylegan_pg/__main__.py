"""`python -m stylegan_pg`, and the console script: the command line, and what its faults look like."""

from __future__ import annotations

import sys

from stylegan_pg.errors import FAULT, USAGE, RunError, UsageError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a fault, 2 bad input or usage, 75 stopped, to be continued."""
    from stylegan_pg.cli import app

    try:
        app()
    except UsageError as error:
        _end(error, USAGE)
    except RunError as error:
        _end(error, FAULT)


def _end(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
