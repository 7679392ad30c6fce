"""The line between a user's mistake and a bug: the first is a :class:`UserError`, anything else a traceback."""


class UserError(ValueError):
    """A mistake the user can mend. The message says what was found, where, and what to do."""
