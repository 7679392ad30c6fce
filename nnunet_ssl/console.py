"""What the console commands have in common: how they log, how they end, and how subcommands are declared."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias

from nnunet_ssl.errors import UserError
from nnunet_ssl.requirements import check_requirements

Arguments = ParamSpec("Arguments")

Subcommands: TypeAlias = "argparse._SubParsersAction[OptionParser]"
"""What ``add_subparsers`` returns."""

PIPE_CLOSED = 141
"""The exit status that a shell gives to a program whose reader went away: 128 + SIGPIPE."""


def command(main: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Decorate a console entry point: log to the terminal, print a :class:`UserError` as one line and exit with 1.

    A full disk and an unwritable folder are the user's to mend as well, so ``OSError`` is reported the same way.
    """

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Terminal(sys.stdout)], force=True)
        logging.getLogger("numexpr").setLevel(logging.WARNING)  # pandas' helper tells how many threads it takes
        try:
            check_requirements()
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


class OptionParser(argparse.ArgumentParser):
    """Options are spelled as nnU-Net spells its own, ``--with_underscores``; hyphens, as in 0.1.0, do as well.

    The lines of a description and of examples stay as they are written.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **keywords})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # of several overloads
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(one) for one in given], namespace)


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.fullmatch("--[a-z][a-z-]*", name) else argument


def add_subcommand(
    commands: Subcommands, name: str, run: Callable[[argparse.Namespace], None], help: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a parser whose arguments are for `run`."""
    parser = commands.add_parser(name, help=help, description=help, epilog=epilog)
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """Read a whole number above 0: the type of an argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """Read a whole number from 0: the type of an argument that seeds random numbers."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0")
    return int(text)


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes no argument
    """Ends the command quietly when nobody reads it any more (``| head``), where logging would report every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # Python's own flush at the end would fail
        sys.exit(PIPE_CLOSED)
