"""The console command ``nnssl_package``."""

from __future__ import annotations

import logging
from pathlib import Path

from nnunet_ssl.console import OptionParser, command

logger = logging.getLogger(__name__)

EXAMPLE = """\
examples:
  nnssl_package $nnUNet_results/Dataset504_ATLASv3/nnUNetTrainerMCLMIM__nnUNetPlans__3d_fullres -o container
  nnssl_package MODEL_A MODEL_B --operated operated -o container
"""


@command
def package() -> None:
    parser = OptionParser(
        prog="nnssl_package",
        description="Write a folder that builds into a container (Docker, Apptainer): the models, this package, and a "
        "program for Grand Challenge, FOMO26 and BIDS data sets.",
        epilog=EXAMPLE,
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of a model that nnU-Net trained")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="the package, a new folder")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="(default: all that are trained to their end)")
    parser.add_argument(
        "--operated",
        type=Path,
        metavar="FOLDER",
        help="of the operating point and the calibration (default: the only model's, if it has any)",
    )
    arguments = parser.parse_args()
    from nnunet_ssl.deployment import packaging

    packaging.package(arguments.models, arguments.o, folds=arguments.f, learned=arguments.operated)
    logger.info("package in %s. Next:", arguments.o)
    logger.info("  docker build --platform linux/amd64 -t lesions %s", arguments.o)
    logger.info("  (cd %s && apptainer build lesions.sif apptainer.def)", arguments.o)
