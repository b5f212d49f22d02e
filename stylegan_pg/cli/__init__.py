"""The command line: `app` has all commands, which the other modules define."""

from stylegan_pg.cli.app import app

__all__ = ["app"]
