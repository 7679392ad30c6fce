"""The line between a user's mistake and a bug: the first is a :class:`UserError`, anything else a traceback."""


class UserError(ValueError):
    """A mistake the user can mend. The message says what was found, where, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise a :class:`UserError` with `message`, a sentence without its full stop, unless `condition` holds."""
    if not condition:
        raise UserError(f"{message}.")


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
