"""The command ``halfbyte``: compare recipes, train, audit, export, look at formats, recipes, what a picture loses.

Exit status: 0 done, 1 a run diverged or an audit failed, 2 something was asked that cannot be done, 130 Ctrl-C, 143
SIGTERM.
Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import HalfbyteError
from . import training  # Its commands stand first in the help.

# isort: split
from . import leaving, looking, measuring
from .app import app

__all__ = ["app", "leaving", "looking", "main", "measuring", "training"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status, see the module's docstring.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="halfbyte")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except HalfbyteError as error:
        sys.stderr.write(f"halfbyte: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"halfbyte: {error.strerror or error}: {error.filename}\n")
        return 2
    return 0
