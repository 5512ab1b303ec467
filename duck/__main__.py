"""The command `duck`, and `python -m duck`: takes Ctrl-C before anything slow is imported."""

from __future__ import annotations


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from duck import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
