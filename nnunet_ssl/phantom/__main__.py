"""``python -m nnunet_ssl.phantom``: write a synthetic data set."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.errors import UserError

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Parse the command line and write the data set."""
    parser = OptionParser(
        prog="python -m nnunet_ssl.phantom",
        description="Write synthetic brain MRI in the folder layout of a real data set.",
        epilog="Example: python -m nnunet_ssl.phantom atlas ATLAS_2 -n 12 --n_test 3 --voxel_mm 2.5",
    )
    parser.add_argument(
        "layout",
        choices=["fomo", "fomo-a", "atlas", "atlas3", "isles", "fcd"],
        help="which data set; fomo-a: flat layout A",
    )
    parser.add_argument("out", type=Path, help="the folder to write (must be new or empty)")
    parser.add_argument(
        "-n",
        type=int,
        default=8,
        help="subjects (atlas: training cases; fcd: patients, and as many controls); default 8",
    )
    parser.add_argument("--n_test", type=int, default=2, help="atlas: test cases without masks; default 2")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="atlas: write the test cases' masks here")
    parser.add_argument("--voxel_mm", type=float, default=3.0, help="voxel size; 1 = real size, 3 = fast (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", action="store_true", help="without the real data sets' quirks")
    args = parser.parse_args()
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: name a new folder for the synthetic data set.")
    _write(args)
    logger.info("Synthetic data set in %s", args.out)


def _write(args: argparse.Namespace) -> None:
    from nnunet_ssl.phantom import layouts

    common = {"voxel_mm": args.voxel_mm, "seed": args.seed, "quirks": not args.clean}
    if args.layout == "atlas":
        layouts.write_atlas(args.out, n_train=args.n, n_test=args.n_test, truth=args.truth, **common)
    elif args.layout == "atlas3":
        layouts.write_atlas3(args.out, n_cases=args.n, **common)
    elif args.layout == "isles":
        layouts.write_isles(args.out, n_cases=args.n, **common)
    elif args.layout == "fcd":
        layouts.write_fcd(args.out, n_patients=args.n, n_controls=args.n, **common)
    else:
        layouts.write_fomo(args.out, n_subjects=args.n, layout="A" if args.layout == "fomo-a" else "B", **common)


if __name__ == "__main__":
    main()
