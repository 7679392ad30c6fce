"""The console command of fine-tuning: ``nnssl_plan``."""

from __future__ import annotations

from nnunet_ssl.console import OptionParser, command, positive

_DESCRIPTION = """\
Plan and preprocess a data set as pre-training saw its scans: RAS, 1 mm, patches of 96^3, z-score where not zero.

nnUNetv2_plan_and_preprocess plans for the data set instead; the trainers work with either plans.
"""

_EXAMPLE = """\
example:
  nnssl_plan -d 501 -np 4
  nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMCLMIM -p nnUNetSSLPlans
  nnUNetv2_predict -i IN -o OUT -d 501 -c 3d_fullres -f 0 -tr nnUNetTrainerMCLMIM -p nnUNetSSLPlans
"""


@command
def plan() -> None:
    parser = OptionParser(prog="nnssl_plan", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("-d", required=True, metavar="DATASET", help="the data set's number or name, in nnUNet_raw")
    parser.add_argument("-np", type=positive, default=4, metavar="N", help="cases at a time (default: 4)")
    arguments = parser.parse_args()

    from nnunet_ssl.trainers.planning import plan_and_preprocess

    plan_and_preprocess(arguments.d, arguments.np)
