"""The command `duck`, and `python -m duck`: readies the process before anything slow is loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any


def main() -> int:
    """Run the command line; returns the exit code."""
    # Until there is something to put away (the event loop then takes over), Ctrl-C just ends us: an
    # exception would be lost or wrapped in the middle of imports.
    signal.signal(signal.SIGINT, _leave)
    for descriptor in range(3):  # closed ones would be taken by the first file or socket we open
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python's word for closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as we live)
    try:
        from duck import cli

        code = cli.main()
        # All is said and put away, and again there is nothing that an exception could stop: it
        # would only tear Python's own end.
        signal.signal(signal.SIGINT, _leave)
        return code
    except KeyboardInterrupt:
        # All is put away on the way here. Not `return`: Python would end itself by the signal when
        # it was caught inside an exec, and wait for threads first.
        _leave()
    return 130


def _leave(*_signal: Any) -> None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
        # What tells progress hides it; the module may be there in part only.
        if console := getattr(sys.modules.get("duck.bars"), "console", None):
            console.show_cursor()
    os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
