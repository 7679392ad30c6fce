"""The command ``nnssl_evaluate``: alignment, lesions, ranking, missing, calibration, probe, finetune, gradients."""

from __future__ import annotations

import logging
import sys

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.evaluation.commands.encoders import add_alignment, add_finetune, add_gradients, add_probe
from nnunet_ssl.evaluation.commands.segmentations import add_calibration, add_lesions, add_missing, add_ranking


@command
def evaluate() -> None:
    parser = OptionParser(
        prog="nnssl_evaluate",
        description="Measure a representation or a segmentation. docs/reference/scores.md defines every figure.",
    )
    commands = parser.add_subparsers(required=True)
    add_alignment(commands)
    add_lesions(commands)
    add_ranking(commands)
    add_missing(commands)
    add_calibration(commands)
    add_probe(commands)
    add_finetune(commands)
    add_gradients(commands)
    commands.metavar = " | ".join(commands.choices)
    arguments = parser.parse_args()
    if getattr(arguments, "json", None) == "-":
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    arguments.run(arguments)
