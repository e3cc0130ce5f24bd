"""`python -m tfaccel` is `tfaccel`."""

import sys

from tfaccel.cli import main

if __name__ == "__main__":
    sys.exit(main())
