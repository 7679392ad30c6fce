"""What ``nnssl_evaluate`` measures of encoders: alignment, probe, finetune, gradients."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ssl.console import Subcommands, add_subcommand, positive, seed
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.commands.common import add_json, share, show

if TYPE_CHECKING:
    from nnunet_ssl.evaluation.embeddings import Embeddings
    from nnunet_ssl.evaluation.scan_prediction import Prediction

logger = logging.getLogger(__name__)


def _add_embedding_source(parser: argparse.ArgumentParser, max_subjects: int) -> None:
    stored = parser.add_argument_group("stored embeddings")
    stored.add_argument("--embeddings", type=Path, metavar="FILE.npz", help="one array (scans, dimensions)")
    stored.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE.csv",
        help="columns filename, embedding_index, modality, patient_id, session_id",
    )
    fresh = parser.add_argument_group("or a checkpoint and a prepared corpus")
    _add_encoder_and_corpus(fresh, max_subjects)
    fresh.add_argument(
        "--view",
        choices=("centre", "tiles"),
        default="centre",
        help="one central patch, or patches over the whole brain",
    )
    fresh.add_argument("--patch_size", type=positive, nargs=3, metavar="N", help="voxels (default: the pre-training's)")
    fresh.add_argument(
        "--subjects", choices=("all", "validation"), default="all", help="validation: those the pre-training held out"
    )
    fresh.add_argument("--batch_size", type=positive, default=4, metavar="N", help="patches at a time (default: 4)")


def _add_encoder_and_corpus(parser: argparse._ActionsContainer, max_subjects: int, *, required: bool = False) -> None:
    """Add what says which encoder sees the scans of whom, and where."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=required,
        metavar="FILE",
        help="any checkpoint nnssl_weights reads, or a pre-training's folder",
    )
    parser.add_argument(
        "-d", metavar="DATASET", help="the corpus, prepared with nnssl_prepare (default: 500)", default="500"
    )
    parser.add_argument(
        "--max_subjects",
        type=positive,
        default=max_subjects,
        metavar="N",
        help=f"draw at most N (default: {max_subjects})",
    )
    parser.add_argument("-device", default="cuda", help="cuda, cuda:1, cpu, mps (default: cuda)")


def _embeddings(arguments: argparse.Namespace) -> tuple[Embeddings, str]:
    """Read the stored embeddings, or compute them; return them with a name for titles."""
    if bool(arguments.embeddings) != bool(arguments.metadata):
        raise UserError("--embeddings and --metadata belong together: the table says what each row of the array is.")
    if bool(arguments.embeddings) == bool(arguments.checkpoint):
        raise UserError("Give either --embeddings and --metadata, or --checkpoint and -d.")
    if arguments.embeddings:
        from nnunet_ssl.evaluation.embeddings import read_embeddings

        return read_embeddings(arguments.embeddings, arguments.metadata), arguments.embeddings.stem
    from nnunet_ssl.devices import find_device
    from nnunet_ssl.evaluation.encoding import EncodingConfig, embed_corpus

    config = EncodingConfig(
        view=arguments.view,
        patch_size=arguments.patch_size and tuple(arguments.patch_size),
        subjects=arguments.subjects,
        max_subjects=arguments.max_subjects,
        batch_size=arguments.batch_size,
    )
    device = find_device(arguments.device)
    return embed_corpus(arguments.checkpoint, arguments.d, config, device), _name_of(arguments.checkpoint)


def _name_of(checkpoint: Path) -> str:
    return checkpoint.name if checkpoint.is_dir() else f"{checkpoint.absolute().parent.name}/{checkpoint.name}"


def add_alignment(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "alignment",
        _alignment,
        "How close a subject's modalities lie in a representation, and subjects apart.",
        """\
examples:
  nnssl_evaluate alignment --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500
  nnssl_evaluate alignment --embeddings mcl.npz --metadata mcl.csv -o alignment_mcl --json
""",
    )
    _add_embedding_source(parser, max_subjects=500)
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write alignment.json, alignment.png and new embeddings here"
    )
    parser.add_argument("--map", choices=("tsne", "pca"), default="tsne", help="2-D map of the figure (default: tsne)")
    add_json(parser)


def _alignment(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.alignment import describe_alignment, measure_alignment

    embeddings, name = _embeddings(arguments)
    result = measure_alignment(embeddings)
    show(result, describe_alignment(result), arguments)
    if arguments.o:
        from nnunet_ssl.evaluation.embeddings import write_embeddings
        from nnunet_ssl.evaluation.figures.alignment import draw_alignment
        from nnunet_ssl.evaluation.results import write_json

        write_json(result, arguments.o / "alignment.json")
        draw_alignment(embeddings, result, arguments.o / "alignment.png", projection=arguments.map, title=name)
        if arguments.checkpoint:
            write_embeddings(embeddings, arguments.o)
        logger.info("written to %s", arguments.o)


def add_probe(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "probe",
        _probe,
        "What a frozen representation knows of a scan: linear probes, split by subject.",
        """\
examples:
  nnssl_evaluate probe --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500 --target age -o probe_age
  nnssl_evaluate probe --embeddings mcl.npz --metadata mcl.csv --target sex --json
  nnssl_evaluate probe --checkpoint mcl_mim -d 500 --target age --across --modalities t1 flair -o probe_across
""",
    )
    _add_embedding_source(parser, max_subjects=10_000)
    _add_target(parser)
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write probe.json, predictions.tsv, probe.png and new embeddings here"
    )
    add_json(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="age", metavar="COLUMN", help="of the manifest or the metadata (default: age)"
    )
    parser.add_argument(
        "--task",
        choices=("auto", "regression", "classification"),
        default="auto",
        help="auto: a regression when the column holds more than ten different numbers",
    )
    parser.add_argument(
        "--modalities", nargs="+", default=[], metavar="NAME", help="learn from and predict no other scans"
    )
    parser.add_argument(
        "--across",
        action="store_true",
        help="learn from each modality alone, too, and predict all of them: across.tsv, across.png",
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="of the cross-validation (default: 5)")


def _probe(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.probes import probe

    embeddings, name = _embeddings(arguments)
    result = probe(
        embeddings,
        arguments.target,
        task=arguments.task,
        folds=arguments.folds,
        across=arguments.across,
        modalities=arguments.modalities,
    )
    _report_prediction(result, "probe", name, arguments)
    if arguments.o and arguments.checkpoint:
        from nnunet_ssl.evaluation.embeddings import write_embeddings

        write_embeddings(embeddings, arguments.o)


def _report_prediction(result: Prediction, stem: str, title: str, arguments: argparse.Namespace) -> None:
    """Show what was predicted of scans, and write it to the folder that was asked for, if one was."""
    from nnunet_ssl.evaluation.scan_prediction import across_table, describe_prediction

    show(result.summary, describe_prediction(result.summary), arguments)
    if not arguments.o:
        return
    from nnunet_ssl.evaluation.figures.across import draw_across
    from nnunet_ssl.evaluation.figures.prediction import draw_prediction
    from nnunet_ssl.evaluation.results import write_json, write_tsv

    write_json(result.summary, arguments.o / f"{stem}.json")
    write_tsv(result.predictions, arguments.o / "predictions.tsv")
    draw_prediction(result, arguments.o / f"{stem}.png", title=title)
    if arguments.across:
        write_tsv(across_table(result.summary), arguments.o / "across.tsv")
        write_tsv(result.across, arguments.o / "across_predictions.tsv")
        draw_across(result.summary, arguments.o / "across.png", title=title)
    logger.info("written to %s", arguments.o)


def add_finetune(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "finetune",
        _finetune,
        "What an encoder can learn of whole scans: fine-tuned with a linear head, split by subject.",
        """\
examples:
  nnssl_evaluate finetune --checkpoint $nnUNet_results/Dataset500_FOMO60K/mcl_mim -d 500 --target age -o finetune_age
  nnssl_evaluate finetune --checkpoint mcl_mim -d 500 --target group --across --modalities t1 flair --scratch -o scratch
""",
    )
    _add_encoder_and_corpus(parser, max_subjects=10_000, required=True)
    _add_target(parser)
    parser.add_argument(
        "--scratch", action="store_true", help="take the checkpoint's architecture, and random weights: the twin"
    )
    parser.add_argument("--steps", type=positive, default=500, metavar="N", help="of a training (default: 500)")
    parser.add_argument(
        "--batch_size",
        type=_several,
        default=8,
        metavar="N",
        help="scans of a step (default: 8)",
    )
    parser.add_argument(
        "--learning_rate",
        type=share,
        default=5e-4,
        metavar="LR",
        help="of the head; a pre-trained encoder learns at a tenth of it (default: 5e-4)",
    )
    parser.add_argument(
        "--box", type=positive, nargs=3, metavar="N", help="voxels that are seen of a scan (default: all brains fit)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of new weights, order and augmentation; the folds stay (default: 0)"
    )
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="write finetune.json, predictions.tsv and finetune.png here"
    )
    add_json(parser)


def _several(text: str) -> int:
    """Read a whole number above 1: the head's normalisation compares the scans of a batch."""
    if (number := positive(text)) == 1:
        raise argparse.ArgumentTypeError("a batch has at least 2 scans")
    return number


def _finetune(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.devices import find_device
    from nnunet_ssl.evaluation.scan_finetuning import FinetuningConfig, finetune_scans

    config = FinetuningConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        scratch=arguments.scratch,
        box=arguments.box and tuple(arguments.box),
        max_subjects=arguments.max_subjects,
        seed=arguments.seed,
    )
    result = finetune_scans(
        arguments.checkpoint,
        arguments.d,
        arguments.target,
        config,
        find_device(arguments.device),
        across=arguments.across,
        task=arguments.task,
        modalities=arguments.modalities,
        folds=arguments.folds,
    )
    name = _name_of(arguments.checkpoint)
    _report_prediction(result, "finetune", f"{name} from scratch" if arguments.scratch else name, arguments)


def add_gradients(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands,
        "gradients",
        _gradients,
        "Which branch of a pre-training moves the encoder, over its steps.",
        """\
example:
  cd $nnUNet_results/Dataset500_FOMO60K && nnssl_evaluate gradients mcl_mim cl_mim mcl_mim_balanced -o gradients
""",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a pre-training, or a progress.csv")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="write gradients.json and gradients.png here")
    add_json(parser)


def _gradients(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.evaluation.gradients import describe_gradients, measure_gradients, read_runs

    runs = read_runs(arguments.runs)
    result = measure_gradients(runs)
    show(result, describe_gradients(result), arguments)
    if arguments.o:
        from nnunet_ssl.evaluation.figures.gradients import draw_gradients
        from nnunet_ssl.evaluation.results import write_json

        write_json(result, arguments.o / "gradients.json")
        draw_gradients(runs, arguments.o / "gradients.png")
        logger.info("written to %s", arguments.o)
