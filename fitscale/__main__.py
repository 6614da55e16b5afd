"""`python -m fitscale` is the `fitscale` program."""

import sys

from fitscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
