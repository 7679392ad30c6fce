"""Index a corpus of unlabelled brain MRI (FOMO60K and its successors, BIDS, nnssl) for pre-training."""

from __future__ import annotations

import logging
from pathlib import Path

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.corpus.indexing import index_corpus, read_exclusions
from nnunet_ssl.corpus.layouts import LAYOUTS
from nnunet_ssl.corpus.prepared import describe_corpus, summarize

EXAMPLE = """\
example:
  python dataset_conversion/Dataset500_FOMO60K.py -i /data/FOMO60K
  nnssl_prepare -d 500 -np 8

--exclude takes a text file with one name a line: a dataset (PT001_OASIS1), a subject (PT001_OASIS1/sub_1), a session
(PT001_OASIS1/sub_1/ses_1), a scan or a path; * and ? are wildcards.
"""


@command
def main() -> None:
    parser = OptionParser(
        description="Index a corpus of brain MRI into $nnUNet_raw. The images stay where they are, and are not opened.",
        epilog=EXAMPLE,
    )
    parser.add_argument("-i", type=Path, required=True, help="the corpus' folder, or nnssl's pretrain_data.json")
    parser.add_argument("-d", type=int, default=500, help="the data set's number (default: 500)")
    parser.add_argument("--name", default="FOMO60K", help="the data set's name (default: FOMO60K)")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="names to leave out, one a line (see below)")
    arguments = parser.parse_args()

    exclude = read_exclusions(arguments.exclude) if arguments.exclude else ()
    folder, scans = index_corpus(arguments.i, arguments.d, arguments.name, layout=arguments.layout, exclude=exclude)
    log = logging.getLogger(__name__)
    log.info("%s", describe_corpus(summarize(scans)))
    log.info("Written to %s. Next: nnssl_prepare -d %d", folder, arguments.d)


if __name__ == "__main__":
    main()
