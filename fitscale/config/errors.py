"""The exceptions that are told in one line, and what turns others into them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 1000  # of a message


class UserError(ValueError):
    """A mistake in a config, a file or a command; its text says what is wrong, where, and what would be valid.

    Command-line programs print the text alone and exit with code 2; anything else is a fault of fitscale and
    keeps its traceback. The text is one line that a terminal can show, whatever a file or a name put into it: spaces
    for white space, escapes for what is not printable, and of a long text its beginning and its end.
    """

    def __str__(self) -> str:
        words = " ".join(super().__str__().split())
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
        if len(text) <= MOST_CHARACTERS:
            return text
        return f"{text[: MOST_CHARACTERS // 2]} ... ({len(text):,} characters) ... {text[-MOST_CHARACTERS // 4 :]}"


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
