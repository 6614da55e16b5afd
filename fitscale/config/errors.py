"""The exceptions that are told in one line, and what turns others into them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_BEGIN, _END = 400, 180  # characters of a text that are shown of a longer one


class UserError(ValueError):
    """A mistake in a config, a file or a command; its text says what is wrong, where, and what would be valid.

    Command-line programs print the text alone and exit with code 2; anything else is a fault of fitscale and
    keeps its traceback. The text is one line that fits a screen, whatever the names and values in it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """`text` for a terminal: one line, control characters escaped, the middle of a long one left out."""
    if len(text) > _BEGIN + _END:
        text = f"{text[:_BEGIN]} ... {text[-_END:]}"
    line = " ".join(map(str.strip, text.splitlines()))
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


class PassingError(UserError):
    """What may be over by itself, such as a store that does not answer: a job that meets it is worth another start."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Around what writes `what`, for a person; raises UserError where it cannot be written: no right, no room."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({os.strerror(error.errno or 0)})") from error


@contextmanager
def mistakes_in(what: str) -> Iterator[None]:
    """Begin the text of a UserError that is raised inside with `what` it is in, such as a cell of a sweep."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
