"""What every program of the project does around its work: a user's mistake becomes one line and an exit code."""

import argparse
import atexit
import errno
import gc
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from fitscale.config.errors import UserError

USER_ERROR = 2  # as argparse's own
INTERRUPTED = 130  # as a shell reports SIGINT
_OF_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
UNREAD = 141  # as a shell reports SIGPIPE
GRACE_S = 2.0  # in which a launcher ends the other processes after the first has failed


def exit_code(function: Callable[[], int | None]) -> int:
    """Run `function` and return the process's exit code: its own (None is 0), 2 for a UserError, 130 for Ctrl-C, 141
    where nobody reads on what it prints (`| head`). A path that the file system refuses for what it is (too long, not a
    folder, not permitted) is told as a UserError is.

    The UserError's text goes to stderr as `error: <text>`, of a rank other than 0 as `rank 5: error: <text>`. Any other
    exception passes: it is a fault of fitscale and keeps its traceback.
    """
    try:
        try:
            code = function() or 0
            sys.stdout.flush()
            return code
        except UserError as error:
            _report(error)
            return USER_ERROR
        except BrokenPipeError:
            if not _unread():
                raise
            return UNREAD
        except OSError as error:
            if error.errno not in _OF_NAMES or error.filename is None:
                raise
            _report(UserError(f"{error.filename}: {os.strerror(error.errno)}"))
            return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code.

    Where it has joined a world of ranks the interpreter's own end is left out, after all that waits for it: a thread of
    gloo that gives back a tensor meanwhile would abort the process, and a run that has saved would count as failed.
    """
    try:
        code: str | int | None = main()
    except SystemExit as stop:
        code = stop.code
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and isinstance(code, int):
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter would: threads, then exit handlers
        atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more; if so it leads nowhere from here on."""
    output = select.poll()
    output.register(1, 0)
    unread = any(event & select.POLLERR for _, event in output.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return unread


def _report(error: UserError) -> None:
    """Print the error, on every rank, because it may be this one's alone (an image of its share is corrupt).

    Mostly all ranks meet the same mistake. So rank 0 speaks at once, then the first of every machine, then the rest:
    by then a launcher such as torchrun has ended those who would only repeat it.
    """
    rank = os.environ.get("RANK", "0")
    try:
        if rank != "0":
            time.sleep(GRACE_S if os.environ.get("LOCAL_RANK", "0") == "0" else 2 * GRACE_S)
    finally:
        prefix = "" if rank == "0" else f"rank {rank}: "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)


def count(text: str) -> int:
    """A whole number of at least 1, as argparse's `type` of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small, the least is 1")
    return number


@contextmanager
def loading(what: str, slowest: str = "torch") -> Iterator[None]:
    """Around imports that take seconds: says so at once, on rank 0, unless the `slowest` module is there already, and
    keeps the garbage collector out of it.

    The collector would walk hundreds of thousands of new objects again and again, of which none is garbage.
    """
    if os.environ.get("RANK", "0") == "0" and slowest not in sys.modules:
        print(f"loading {what}", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)
