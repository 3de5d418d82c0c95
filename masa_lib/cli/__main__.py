"""`python -m masa_lib.cli`."""

import sys

from masa_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
