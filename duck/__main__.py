"""The command `duck`, and `python -m duck`: takes Ctrl-C before anything slow is imported."""

from __future__ import annotations

import contextlib
import os
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from duck import cli

        return cli.main()
    except KeyboardInterrupt:
        # All is put away on the way here. Not `return`: Python would end itself by the signal when it
        # was caught inside an exec (every dataclass has one), and wait for threads first.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
