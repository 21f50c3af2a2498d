"""`python -m transferkit` is the command `transferkit`."""

import sys

from transferkit.command.main import main

if __name__ == "__main__":
    sys.exit(main())
