"""The exceptions that are told in one line."""


class UserError(ValueError):
    """A mistake in a config, a file or a command; its text says what is wrong, where, and what would be valid.

    Command-line programs print the text alone and exit with code 2; anything else is a fault of fitscale and
    keeps its traceback.
    """


class PassingError(UserError):
    """What may be over by itself, such as a store that does not answer: a job that meets it is worth another start."""
