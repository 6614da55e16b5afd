"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a config, a file or a command; its text says what is wrong, where, and what would be valid.

    Command-line programs print the text alone and exit with code 2; anything else is a fault of fitscale and
    keeps its traceback.
    """
