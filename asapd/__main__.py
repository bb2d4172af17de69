"""`python -m asapd` is `asapd`."""

import sys

from asapd.cli.asapd import main

if __name__ == "__main__":
    sys.exit(main())
