"""``python -m metakd``: the same command line as ``metakd``."""

from metakd.cli import main

if __name__ == "__main__":
    main()
