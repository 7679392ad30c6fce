"""The line between a user's mistake (one sentence, exit status 1) and a bug (a traceback)."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake the user can mend. The message says what was found, where, and what to do."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a console entry point: log to the terminal, print a :class:`UserError` as one line and exit with 1.

    A full disk and an unwritable folder are the user's to mend as well, so ``OSError`` is reported the same way.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        logging.getLogger("numexpr").setLevel(logging.WARNING)  # pandas' helper tells how many threads it takes
        try:
            main(*args, **kwargs)
        except (UserError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with one line and status 1 on a :class:`UserError`, inside a command that is not ours."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
