"""`python -m stylegan_pg`, and the console script: the command line, and what its faults look like."""

from __future__ import annotations

import io
import sys

from stylegan_pg import launcher
from stylegan_pg.errors import DONE, FAULT, USAGE, RunError, UsageError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a fault, 2 bad input or usage, 75 stopped, to be continued."""
    code = FAULT  # of a bug, which shows its traceback
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from stylegan_pg.cli import app

        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else FAULT
    except UsageError as error:
        code = _told(error, USAGE)
    except RunError as error:
        code = _told(error, FAULT)
    finally:
        status = launcher.leave(code)
    sys.exit(status)


def _told(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
