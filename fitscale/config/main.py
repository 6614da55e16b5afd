"""What every program of the project does around its work: a user's mistake becomes one line and an exit code."""

import os
import sys
from collections.abc import Callable

from fitscale.config.errors import UserError

USER_ERROR = 2  # as argparse's own
INTERRUPTED = 130  # as a shell reports SIGINT


def exit_code(function: Callable[[], int | None]) -> int:
    """Run `function` and return the process's exit code: its own (None is 0), 2 for a UserError, 130 for Ctrl-C.

    The UserError's text goes to stderr as `error: <text>`; under torchrun, where every rank meets the same mistake,
    only rank 0 prints it. Any other exception passes: it is a fault of fitscale and keeps its traceback.
    """
    try:
        return function() or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
