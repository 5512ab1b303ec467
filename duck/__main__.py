"""`python -m duck` is the command `duck`."""

from duck.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
