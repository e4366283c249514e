"""`python -m aqaa` is the command `aqaa`."""

import sys

from aqaa.cli import main

if __name__ == "__main__":
    sys.exit(main())
