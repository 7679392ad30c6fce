"""``python -m nnunet_ssl.phantom``: write a synthetic data set."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
from pathlib import Path

from nnunet_ssl.console import OptionParser, command, seed
from nnunet_ssl.errors import UserError

logger = logging.getLogger(__name__)

FOMO = ("fomo", "fomo-a")
PARTICULAR = {
    "truth": ("atlas", "isles", "fcd"),
    "rater": ("isles", "fcd"),
    "contrast_to_noise": ("isles", "fcd"),
    "modalities": ("tissue", *FOMO),
    "labels": ("tissue",),
}
"""The layouts that know an option, of those that not all know."""


@command
def main() -> None:
    """Parse the command line and write the data set."""
    parser = OptionParser(
        prog="python -m nnunet_ssl.phantom",
        description="Write synthetic brain MRI in the folder layout of a real data set.",
        epilog="""\
examples:
  python -m nnunet_ssl.phantom atlas ATLAS_2 -n 12 --n_test 3 --voxel_mm 2.5
  python -m nnunet_ssl.phantom isles ISLES-2022 -n 24 --rater flair --truth truth
  python -m nnunet_ssl.phantom fomo FOMO60K -n 60 --modalities t1 flair dwi --clean
  python -m nnunet_ssl.phantom tissue $nnUNet_raw/Dataset541_TissueT1 -n 24 --modalities t1
""",
    )
    parser.add_argument(
        "layout",
        choices=["fomo", "fomo-a", "atlas", "atlas3", "isles", "fcd", "tissue"],
        help="which data set; fomo-a: flat layout A; tissue: a data set of nnU-Net, without lesions",
    )
    parser.add_argument("out", type=Path, help="the folder to write (must be new or empty)")
    parser.add_argument(
        "-n",
        type=int,
        default=8,
        help="subjects (atlas, tissue: training cases; fcd: patients, and as many controls); default 8",
    )
    parser.add_argument(
        "--n_test", type=int, default=2, help="atlas, tissue: test cases (atlas: without masks); default 2"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="DIR",
        help="isles, fcd: write the lesions as they are here, whoever drew the masks; atlas: the test cases' masks",
    )
    parser.add_argument(
        "--rater",
        metavar="MODALITY",
        help="isles, fcd: masks hold what a rater sees in this modality alone (default: the lesions as they are)",
    )
    parser.add_argument(
        "--contrast_to_noise",
        type=float,
        metavar="K",
        help="what the rater sees: changes of K standard deviations of the scan's noise (default: 5)",
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="MODALITY",
        help="tissue: the channels (default: t1); fomo: the scans of every session, strokes by half the subjects",
    )
    parser.add_argument(
        "--labels",
        choices=["tissue", "lobes", "regions"],
        help="tissue: what the labels are; regions are lobes by side (default: tissue)",
    )
    parser.add_argument("--voxel_mm", type=float, default=3.0, help="voxel size; 1 = real size, 3 = fast (default)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--clean", action="store_true", help="without the real data sets' quirks")
    args = parser.parse_args()
    out = Path(os.path.normpath(args.out.absolute()))  # "." has no name; a link keeps its own
    unfinished = (out if out.is_dir() else out.parent) / f".unfinished.{out.name}"
    if out.exists() and any(entry != unfinished for entry in out.iterdir()):
        raise UserError(f"{args.out} is not empty: name a new folder for the synthetic data set.")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a try that was interrupted
    _write(args, unfinished / out.name)
    _move(unfinished / out.name, out)
    unfinished.rmdir()
    logger.info("Synthetic data set in %s", args.out)


def _move(written: Path, out: Path) -> None:
    """Give what was written its name; a folder that is there stays, as where somebody stands or a disk is mounted."""
    if not out.is_dir():
        written.replace(out)
        return
    for entry in list(written.iterdir()):
        entry.replace(out / entry.name)
    written.rmdir()


def _write(args: argparse.Namespace, out: Path) -> None:
    from nnunet_ssl.phantom import layouts

    common = {"voxel_mm": args.voxel_mm, "seed": args.seed, "quirks": not args.clean} | _particular(args)
    if args.layout == "atlas":
        layouts.write_atlas(out, n_train=args.n, n_test=args.n_test, **common)
    elif args.layout == "atlas3":
        layouts.write_atlas3(out, n_cases=args.n, **common)
    elif args.layout == "isles":
        layouts.write_isles(out, n_cases=args.n, **common)
    elif args.layout == "fcd":
        layouts.write_fcd(out, n_patients=args.n, n_controls=args.n, **common)
    elif args.layout == "tissue":
        del common["quirks"]
        layouts.write_tissue(out, n_train=args.n, n_test=args.n_test, **common)
    else:
        layouts.write_fomo(out, n_subjects=args.n, layout="A" if args.layout == "fomo-a" else "B", **common)


def _particular(args: argparse.Namespace) -> dict[str, object]:
    """Return the given options that not every layout knows.

    Raises:
        UserError: this one does not know one of them, or it has no scans of a modality.
    """
    from nnunet_ssl.phantom import contrast
    from nnunet_ssl.phantom.layouts import fcd, isles

    given = {name: getattr(args, name) for name in PARTICULAR if getattr(args, name) is not None}
    for name in given:
        if args.layout not in PARTICULAR[name]:
            raise UserError(f"{args.layout} has no --{name}, which is for {', '.join(PARTICULAR[name])}: leave it out.")
    scanned = {"isles": isles.MODALITIES, "fcd": fcd.MODALITIES}.get(args.layout, contrast.MODALITIES)
    for modality in [*given.get("modalities", ()), *([args.rater] if args.rater else ())]:
        if modality not in scanned:
            raise UserError(f"{args.layout} has no scans of {modality}; it has {', '.join(scanned)}.")
    if args.contrast_to_noise is not None and not args.rater:
        raise UserError("--contrast_to_noise says what a rater sees, and nobody was named: add --rater.")
    if args.contrast_to_noise is not None and not 0 <= args.contrast_to_noise < math.inf:
        raise UserError(f"--contrast_to_noise {args.contrast_to_noise:g} is no number from 0.")
    return given


if __name__ == "__main__":
    main()
