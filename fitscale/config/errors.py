"""The exceptions that are told in one line."""

import os


class UserError(ValueError):
    """A mistake in a config, a file or a command; its text says what is wrong, where, and what would be valid.

    Command-line programs print the text alone and exit with code 2; anything else is a fault of fitscale and
    keeps its traceback.
    """


class PassingError(UserError):
    """What may be over by itself, such as a store that does not answer: a job that meets it is worth another start."""


def cannot_write(what: object, error: OSError) -> UserError:
    """The UserError for a file or folder that cannot be written: no right, no room."""
    return UserError(f"{what}: cannot be written ({os.strerror(error.errno or 0)})")
