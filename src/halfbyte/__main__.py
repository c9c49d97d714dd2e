"""``python -m halfbyte`` is the command ``halfbyte``; so it can be started by ``torchrun -m``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
