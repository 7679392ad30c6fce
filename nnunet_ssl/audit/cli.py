"""The console command ``nnssl_audit``: has a pre-training seen the data that it is tested on?"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from nnunet_ssl.console import OptionParser, command, positive

if TYPE_CHECKING:
    from nnunet_ssl.audit.audit import Audit

EXIT_WITH_LEAKS = 3
"""``nnssl_audit`` finished, and the corpus, or what is told of it, has subjects of the labelled data set."""

SHOWN = 20

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Compare a corpus for pre-training with a labelled data set: by the public data sets that both name, by the names of
subjects and files, and by what the images show, whatever their orientation, voxel size, intensities and skull.
"""

_EXAMPLES = f"""\
examples:
  nnssl_audit -d 500 -t 501 -np 8
  nnssl_audit -d 500 -t 504 --names_only
  nnssl_audit --weights brainsegfounder-atlas -t 501

Writes $nnUNet_raw/CORPUS/audits/LABELLED/pairs.tsv and $nnUNet_raw/CORPUS/exclusions/LABELLED.txt, which nnssl_prepare
honours. Exit status: 0 nothing shared was found; {EXIT_WITH_LEAKS} something was, and a pre-training would see it;
1 not finished.
"""


@command
def main() -> None:
    parser = OptionParser(prog="nnssl_audit", description=_DESCRIPTION, epilog=_EXAMPLES)
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("-d", metavar="CORPUS", help="number or name of an indexed corpus")
    side.add_argument("--weights", metavar="NAME", help="published weights (nnssl_weights list): what is told of them")
    parser.add_argument("-t", required=True, metavar="LABELLED", help="number or name of an nnU-Net data set")
    parser.add_argument("-np", type=positive, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--names_only", action="store_true", help="open no image: origins and names alone")
    arguments = parser.parse_args()
    if arguments.weights:
        _audit_weights(arguments.weights, arguments.t)
        return

    from nnunet_ssl.audit.audit import audit

    result = audit(arguments.d, arguments.t, content=not arguments.names_only, processes=arguments.np)
    logger.info("%s", describe(result))
    only_told = arguments.names_only and result.origins and not result.pairs
    if result.still_in or only_told:
        sys.exit(EXIT_WITH_LEAKS)


def describe(result: Audit) -> str:
    """Return what an audit found, in lines."""
    from nnunet_ssl.audit.comparison import LEAKS

    verdict = result.verdict
    lines = [f"{verdict['corpus']} and {verdict['labelled']}:"]
    for name, (ours, theirs) in result.origins.items():
        lines.append(f"  both have data of {name} (the corpus: {ours}; the labelled data set: {theirs})")
    if not result.origins:
        lines.append("  no public data set that is known here is named by both")
    if verdict["content_compared"]:
        lines.append(
            f"  images compared: {verdict['labelled_images_compared']:,} labelled with "
            f"{verdict['corpus_scans_compared']:,} of {verdict['corpus_scans']:,} scans; "
            "a scan is found by one of its own contrast"
        )
    else:
        lines.append("  images were not compared")
    counts = ", ".join(f"{count} {name}" for name, count in verdict["pairs"].items() if count)
    lines.append(f"  pairs: {counts or 'none'}")
    leaks = [pair for pair in result.pairs if pair.verdict in LEAKS]
    lines += [f"    {pair.verdict}: {pair.case} is {pair.scan_id}" for pair in leaks[:SHOWN]]
    lines += [f"    and {len(leaks) - SHOWN} more"] if len(leaks) > SHOWN else []
    if unseen := sum(bool(pair.reason) for pair in result.pairs):
        lines.append(f"  {unseen} pairs are alike and could not be looked at closely: see their reason in the list")
    lines.append(f"The whole list: {result.folder / 'pairs.tsv'}")
    if before := verdict["subjects_to_exclude"] - len({pair.subject for pair in leaks}):
        lines.append(f"{before} more subjects were found by an earlier audit that compared more, and stay excluded.")
    if verdict["subjects_to_exclude"]:
        lines.append(
            f"{verdict['cases_met']} of {verdict['cases']} cases are met. {result.exclusions} names the "
            f"{verdict['subjects_to_exclude']} subjects; nnssl_prepare leaves them out."
        )
        still = len(result.still_in)
        lines.append(
            f"{still} of them are not left out yet: run nnssl_prepare -d {verdict['corpus']} again, with its first "
            "options, and then this."
            if still
            else "All of them are left out already."
        )
    return "\n".join(lines)


def _audit_weights(name: str, labelled: str) -> None:
    """Say what is told of the corpus of published weights; exit with a status that says whether it has shared data."""
    from nnunet_ssl.audit.origins import inside_corpus, known_corpora, known_origins, origins_in
    from nnunet_ssl.audit.scans import labelled_cases
    from nnunet_ssl.nnunet_folders import dataset_folder
    from nnunet_ssl.weights.zoo import entry_of

    entry = entry_of(name)
    target = dataset_folder(labelled, "nnUNet_raw")
    sources = {part for case in labelled_cases(target) for path in case.sources for part in path.split("/")[-5:]}
    origins = origins_in({target.name, *sources})
    corpus = known_corpora().get(entry.corpus)
    logger.info("%s was pre-trained on %s.", name, corpus.what if corpus else entry.corpus)
    if not origins:
        logger.info("%s names no public data set that is known here.", target.name)
    told = inside_corpus(corpus, origins) if corpus else {}
    for origin, why in origins.items():
        said = told.get(origin, "nothing is known of it in that corpus")
        logger.info("  %s (%s; %s): %s", origin, known_origins()[origin].what, why, said)
    logger.info("This is what was published about the corpus; its scans were not compared.")
    if told:
        sys.exit(EXIT_WITH_LEAKS)
