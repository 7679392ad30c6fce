"""What the subcommands of ``nnssl_evaluate`` share."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for which :func:`show` looks."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON to FILE, or to standard output"
    )


def show(result: dict[str, Any], text: str, arguments: argparse.Namespace) -> None:
    """Show the result as asked, lines for a person or JSON for a program; before files are written, which may fail."""
    from nnunet_ssl.evaluation.results import json_text, write_json

    if arguments.json == "-":
        sys.stdout.write(json_text(result))
    else:
        logger.info("%s", text)
        if arguments.json:
            write_json(result, Path(arguments.json))


def share(text: str) -> float:
    """Read a number between 0 and 1, both excluded."""
    try:
        if 0 < (value := float(text)) < 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")
