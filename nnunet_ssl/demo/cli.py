"""The console command ``nnssl_demo``."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.errors import UserError

NEEDED_GB = 1.0

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
The whole story on synthetic brains: write scans, pre-train an encoder on those without labels, fine-tune it in stock
nnU-Net for stroke lesions, predict held-out cases, measure. Every command is shown, so that you can repeat it.
Interrupted, it continues where it stopped.
"""

_NEXT = """
What to type with real data (README.md says more):
  export nnUNet_raw=/data/nnUNet_raw nnUNet_preprocessed=/data/nnUNet_preprocessed nnUNet_results=/data/nnUNet_results
  python dataset_conversion/Dataset500_FOMO60K.py -i /data/FOMO60K && nnssl_prepare -d 500 -np 8
  nnssl_pretrain -c mcl_mim
  python dataset_conversion/Dataset501_ATLASv2.py -i /data/ATLAS_2
  nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres
  nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMCLMIM"""


@command
def main() -> None:
    parser = OptionParser(
        prog="nnssl_demo",
        description=_DESCRIPTION,
        epilog="example:\n  nnssl_demo -w /tmp/demo -device cpu",
    )
    parser.add_argument("-w", type=Path, default=Path("demo_work"), metavar="FOLDER", help="(default: demo_work)")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is a GPU, else cpu")
    arguments = parser.parse_args()
    work = arguments.w.resolve()
    check(work)

    from nnunet_ssl.demo.outcome import describe_demo, draw
    from nnunet_ssl.demo.resuming import run_steps
    from nnunet_ssl.demo.steps import steps, variables
    from nnunet_ssl.devices import default_device

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # so that the command under way ends as well
    device = arguments.device or default_device()
    environment = variables(work, device)
    show_variables(environment)
    run_steps(steps(work, device), work / "logs", environment)
    draw(work, work / "demo.png")
    logger.info("\n%s\n\nThe figure is %s\n%s", describe_demo(work), work / "demo.png", _NEXT)


def check(work: Path) -> None:
    """Make the work folder.

    Raises:
        UserError: there is no space for it, or nilearn, which has the template of the synthetic brains, is missing.
        OSError: it cannot be made.
    """
    if importlib.util.find_spec("nilearn") is None:
        raise UserError('The demo\'s synthetic brains need nilearn: pip install "nnunet_ssl[demo]"')
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free / 1e9
    if free < NEEDED_GB:
        raise UserError(f"{work} has {free:.1f} GB left; the demo needs {NEEDED_GB:g} GB. Name another folder with -w.")


def show_variables(variables: dict[str, str]) -> None:
    """Show what has to be set to repeat the commands by hand."""
    logger.info("Synthetic brains; small networks. To repeat a command by hand, set first:")
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ["PATH"].split(os.pathsep):
        logger.info("export PATH=%s:$PATH", programs)
    for name, value in variables.items():
        logger.info("export %s=%s", name, value)
