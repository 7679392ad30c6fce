"""``python -m nnunet_ssl.deployment``: the program of a package, for challenges and for data sets of one's own."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.console import OptionParser, Subcommands, add_subcommand, command
from nnunet_ssl.deployment.resources import limit_threads, measured
from nnunet_ssl.deployment.weights import MOUNT, find_weights
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.deployment.segmenting import Segmenter

CONTRASTS = ("t1", "t1c", "t2", "flair", "dwi", "adc", "t2s", "swi", "pd", "input")
PACKAGE, EXTERNAL_TRAINERS = "nnssl_package", "nnUNet_extTrainer"
SEGMENTATIONS = (".nii.gz", ".nii", ".mha")

logger = logging.getLogger(__name__)


@command
def main() -> None:
    parser = OptionParser(
        prog="python -m nnunet_ssl.deployment", description="Segment lesions with a package made by nnssl_package."
    )
    parser.add_argument(
        "--package", type=Path, default=Path(os.environ.get(PACKAGE, ".")), metavar="DIR",
        help="the package (default: $nnssl_package)",
    )  # fmt: skip
    parser.add_argument(
        "--mount", type=Path, default=MOUNT, metavar="DIR", help=f"separately uploaded weights (default: {MOUNT})"
    )
    commands = parser.add_subparsers(required=True, metavar="serve | predict | bids")
    _add_serve(commands)
    _add_predict(commands)
    _add_bids(commands)
    arguments = parser.parse_args()
    threads = limit_threads()  # before anything imports NumPy or PyTorch
    _find_trainers(arguments.package)
    logger.info("%d CPU threads", threads)
    arguments.run(arguments)


def _add_serve(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "serve", _serve, "Answer Grand Challenge's /health and /invoke (ISLES'26).",
        "example:\n  docker run --network none -v IN:/input -v OUT:/output NAME serve",
    )  # fmt: skip
    parser.add_argument("--input", type=Path, default=Path("/input"), metavar="DIR", help="(default: /input)")
    parser.add_argument("--output", type=Path, default=Path("/output"), metavar="DIR", help="(default: /output)")
    parser.add_argument("--port", type=int, default=4743, metavar="N", help="0: any that is free (default: 4743)")


def _serve(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.deployment.challenge import make_server

    server = make_server(lambda: _load(arguments), arguments.input, arguments.output, arguments.port)
    logger.info("listening on port %d", server.server_address[1])
    server.serve_forever()


def _add_predict(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "predict", _predict, "Segment one case, as FOMO26's tasks ask for it.",
        "example:\n  apptainer run model.sif predict --flair FLAIR.nii.gz --dwi DWI.nii.gz --output MASK.nii.gz",
    )  # fmt: skip
    for name in CONTRASTS:
        what = "the image, whatever its contrast" if name == "input" else f"the {name} image"
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE",
        help=".nii.gz, .mha: the mask; .txt: the highest probability of a lesion; .npy: the features of the encoder",
    )  # fmt: skip


def _predict(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.imaging.metaimage import read_image, write_image

    output, ending = arguments.output, arguments.output.name.lower()
    if not ending.endswith((*SEGMENTATIONS, ".txt", ".npy")):
        raise UserError(f"{output} ends neither in {', '.join(SEGMENTATIONS)}, for a mask, nor in .txt or .npy.")
    given = {name: path for name in CONTRASTS if (path := getattr(arguments, name)) is not None}
    model = _load(arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with measured() as used:
        images = [read_image(path) for path in model.choose(given)]
        if ending.endswith(".npy"):
            import numpy as np

            np.save(output, model.embed(images))
            what = "features"
        else:
            result = model.segment(images)
            what = result.describe_volume()
            if ending.endswith(".txt"):
                output.write_text(f"{result.highest:.6f}\n")
            else:
                write_image(output, result.labels)
    logger.info("%s: %s; %s", output, what, ", ".join(used))


def _add_bids(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "bids", _bids, "Segment a BIDS data set; write BIDS derivatives.",
        "example:\n  apptainer run model.sif bids /data/bids /data/bids/derivatives/lesions",
    )  # fmt: skip
    parser.add_argument("source", type=Path, help="the data set")
    parser.add_argument("target", type=Path, help="the derivatives to write")


def _bids(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.deployment.bids import segment_dataset

    failures = segment_dataset(_load(arguments), arguments.source.absolute(), arguments.target.absolute())
    if failures:
        sys.exit(f"{failures} sessions failed")


def _load(arguments: argparse.Namespace) -> Segmenter:
    """Import what is large, check the weights and load them."""
    if not (arguments.package / "weights.json").is_file():
        raise UserError(f"{arguments.package} is no package of nnssl_package: give --package or set nnssl_package.")
    weights = find_weights(arguments.package, arguments.mount)
    import torch

    from nnunet_ssl.deployment.segmenting import Segmenter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("weights of %s, on %s", weights, device)
    return Segmenter(weights, device)


def _find_trainers(package: Path) -> None:
    """Tell nnU-Net where the trainers are: in an installation a start-up file does that, a container has none."""
    import nnunet_ssl

    folders = [Path(nnunet_ssl.__file__).parent / "trainers" / "discovery", package / "app" / "trainers"]
    known = os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep)
    new = [str(folder) for folder in folders if folder.is_dir() and str(folder) not in known]
    os.environ[EXTERNAL_TRAINERS] = os.pathsep.join([*filter(None, known), *new])


if __name__ == "__main__":
    main()
