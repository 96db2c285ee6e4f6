"""`python -m diffusers_hidiff` does what `hidiff` does."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
