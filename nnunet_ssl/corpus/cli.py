"""The console command of the corpus: ``nnssl_prepare``."""

from __future__ import annotations

import logging
import sys

from nnunet_ssl.console import OptionParser, command

EXIT_WITH_FAILURES = 3
"""``nnssl_prepare`` finished and the store can be used, but some scans are not in it."""

logger = logging.getLogger(__name__)

_PREPARE_EXAMPLE = f"""\
examples:
  nnssl_prepare -d 500 -np 8
  nnssl_prepare -d 500 --skull_strip hd-bet -device cuda
  nnssl_prepare -d 500 --scheduler tcp://host:8786

It may be interrupted at any time; the same call goes on where it stopped.
Exit status: 0 all scans prepared; {EXIT_WITH_FAILURES} finished, some scans are in failures.tsv; 1 not finished.
"""


@command
def prepare() -> None:
    parser = OptionParser(
        prog="nnssl_prepare",
        description="Preprocess an indexed corpus of brain MRI for pre-training.",
        epilog=_PREPARE_EXAMPLE,
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="the corpus' number or name, as indexed")
    parser.add_argument("-np", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="let the workers of this Dask scheduler do it instead")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar="MM", help="voxel size (default: 1 1 1)"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="(default: float16)")
    parser.add_argument("--skull_strip", choices=("hd-bet",), help="strip the sessions that are not stripped yet")
    parser.add_argument(
        "--register",
        choices=("rigid",),
        help="register the scans of a session that lie on another grid or do not agree in place",
    )
    parser.add_argument(
        "--stripped", nargs="+", default=(), metavar="DATASET", help="these are stripped, whatever they look like"
    )
    parser.add_argument("--not_stripped", nargs="+", default=(), metavar="DATASET", help="and these are not")
    parser.add_argument("-device", default="cpu", help="where HD-BET runs: cpu, cuda, cuda:1, ... (default: cpu)")
    arguments = parser.parse_args()
    if arguments.np < 1:
        parser.error("-np must be at least 1")

    from nnunet_ssl.corpus.plans import PreparationConfig
    from nnunet_ssl.corpus.prepare import prepare_corpus
    from nnunet_ssl.corpus.prepared import describe_corpus

    config = PreparationConfig(
        spacing=tuple(arguments.spacing),
        dtype=arguments.dtype,
        skull_strip=arguments.skull_strip,
        register=arguments.register,
        stripped=tuple(arguments.stripped),
        not_stripped=tuple(arguments.not_stripped),
    )
    report = prepare_corpus(
        arguments.d, config, processes=arguments.np, scheduler=arguments.scheduler, device=arguments.device
    )
    logger.info("%s\nThe store is in %s", describe_corpus(report.summary), report.folder)
    if report.summary.get("pairs_apart") and not arguments.register:
        apart = "The manifest's column agreement tells which scans lie apart"
        logger.info("%s; a store that is begun with --register rigid registers them.", apart)
    noted = (report.manifest["notes"].fillna("") != "").sum() if "notes" in report.manifest else 0
    if noted:
        logger.info("%d scans have a note on how they were read or placed, in the manifest's column notes.", noted)
    cut = (report.manifest["foreground_kept"] < 1).sum() if "foreground_kept" in report.manifest else 0
    if cut:
        logger.info("%d scans reach beyond their session's grid; foreground_kept tells how much is left.", cut)
    if "aligned_to" not in report.manifest or (report.manifest["aligned_to"].fillna("") == "").any():
        logger.info("Some sessions were prepared before scans were compared; all their modalities count as pairs.")
    skulls = (report.manifest["skull"] == "present").sum()
    if skulls:
        stripped = "a store that is begun with --skull_strip hd-bet has none"
        logger.info("%d scans seem to have their skull still; %s.", skulls, stripped)
    if len(report.failures):
        logger.info("%d scans could not be used, see %s", len(report.failures), report.folder / "failures.tsv")
        sys.exit(EXIT_WITH_FAILURES)
