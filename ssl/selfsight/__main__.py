"""`python -m selfsight`: the same as the `selfsight` command."""

import sys

from selfsight.cli import main

if __name__ == "__main__":
    sys.exit(main())
