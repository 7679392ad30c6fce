"""The command line that the conversion scripts share."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.console import OptionParser
from nnunet_ssl.conversion.dataset import PARTS, Case, Prepare, SomeCase, Target, convert, write_dataset_json
from nnunet_ssl.conversion.discovery import Skipped
from nnunet_ssl.conversion.reporting import log_skipped
from nnunet_ssl.conversion.splits import Folds, make_splits, store_splits
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import new_dataset_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What the scripts say about a data set.

    Attributes:
        name: ends the folder's name after ``DatasetXXX_``; single channels append theirs.
        channel_names: channel -> its name in dataset.json, in nnU-Net's order.
        numbers: channels -> default data set number; empty where the user has to choose one.
        reference: where the data come from.
        licence: its terms.
        preparation: its key in :data:`nnunet_ssl.conversion.preparations.PREPARATIONS`, if that is not the name.
    """

    name: str
    channel_names: Mapping[str, str]
    numbers: Mapping[tuple[str, ...], int]
    reference: str
    licence: str
    preparation: str = ""


def make_parser(info: DatasetInfo, description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all conversion scripts have."""
    parser = OptionParser(description=description, epilog=example)
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="the folder with the data")
    number = f"the data set's number (default: {_default_numbers(info)})" if info.numbers else "the data set's number"
    parser.add_argument("-d", type=int, required=not info.numbers, metavar="ID", help=number)
    parser.add_argument("-np", type=int, default=4, metavar="N", help="cases at a time (default: 4)")
    parser.add_argument(
        "--skull_strip", choices=("hd-bet",), help="remove what is not brain (see docs/how-to/convert.md)"
    )
    parser.add_argument("-device", default=None, help="where HD-BET runs (default: cuda if there is one, else cpu)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, write nothing")
    parser.add_argument("--images_only", action="store_true", help="prepare new images for nnUNetv2_predict (needs -o)")
    parser.add_argument("-o", type=Path, metavar="OUT", help="--images_only: the folder to write")
    if len(info.channel_names) > 1:
        names = list(info.channel_names)
        parser.add_argument("--channels", nargs="+", choices=names, default=names, help="default: all")
        parser.add_argument(
            "--allow_missing",
            action="store_true",
            help="keep cases that lack some of the channels, for nnssl_settings=channels=any",
        )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: options that don't go together.
    """
    arguments = parser.parse_args()
    if arguments.images_only != (arguments.o is not None):
        raise UserError("--images_only and -o OUT belong together: -o names the folder for the prepared images.")
    if arguments.images_only and arguments.o.resolve() == arguments.i.resolve():
        raise UserError(f"-i and -o are the same folder, {arguments.o}: give the prepared images one of their own.")
    return arguments


def chosen_channels(arguments: argparse.Namespace, info: DatasetInfo) -> tuple[str, ...]:
    """Return the channels to convert, always in the data set's own order."""
    wanted = getattr(arguments, "channels", info.channel_names)
    return tuple(name for name in info.channel_names if name in wanted)


def run(
    arguments: argparse.Namespace,
    info: DatasetInfo,
    cases: Sequence[SomeCase],
    skipped: Sequence[Skipped],
    prepare: Prepare[SomeCase],
    folds: Folds = "random",
    strata_of: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, str]] | None = None,
) -> None:
    """Convert the cases as the command line asks, and say what to type next.

    `strata_of` tells from the training cases' rows of the report by what folds of the kind "centre" are balanced.

    Raises:
        UserError: nnU-Net's folders aren't set, or nothing can be converted.
    """
    channels = chosen_channels(arguments, info)
    number = info.numbers[channels] if arguments.d is None else arguments.d
    everything = len(channels) == len(info.channel_names)
    name = info.name if everything else "_".join([info.name, *(channel.upper() for channel in channels)])
    target = Target(
        folder=arguments.o if arguments.images_only else new_dataset_folder(number, name),
        channels=channels,
        images_only=arguments.images_only,
        strip=arguments.skull_strip is not None,
        device=_device(arguments),
    )
    if arguments.dry_run:
        _describe(cases, skipped, target)
        return
    converted, rows = convert(cases, skipped, target, prepare, arguments.np)
    if target.images_only:
        logger.info("%d cases in %s. Next:", len(converted), target.folder)
        logger.info(
            "  nnUNetv2_predict -i %s -o PREDICTIONS -d %d -c 3d_fullres -f 0 -tr TRAINER", target.folder, number
        )
    else:
        training = [case for case in converted if case.part == "Tr"]
        names = [info.channel_names[channel] for channel in channels]
        write_dataset_json(
            target.folder,
            len(training),
            names,
            _missing(rows, info),
            reference=info.reference,
            licence=info.licence,
            prepared_as=info.preparation or info.name,
            **({"skull_strip": arguments.skull_strip} if arguments.skull_strip else {}),
        )
        strata = strata_of([row for row in rows if row["part"] == "train"]) if strata_of else None
        store_splits(make_splits(training, folds, strata), target.folder)
        logger.info(
            "%d training and %d test cases in %s. Next:", len(training), len(rows) - len(training), target.folder
        )
        logger.info("  nnUNetv2_plan_and_preprocess -d %d --verify_dataset_integrity", number)
        settings = "nnssl_settings=channels=any " if _missing(rows, info) else ""
        logger.info("  %snnUNetv2_train %d 3d_fullres 0 -tr nnUNetTrainerMCLMIM", settings, number)
    logger.info("%s", _skull_hint([row["stripped"] for row in rows], target))


def _default_numbers(info: DatasetInfo) -> str:
    return ", ".join(f"{number} = {' '.join(channels)}" for channels, number in info.numbers.items())


def _device(arguments: argparse.Namespace) -> str:
    if arguments.device or not arguments.skull_strip:
        return arguments.device or "cpu"
    from nnunet_ssl.devices import default_device

    return default_device()


def _describe(cases: Sequence[Case], skipped: Sequence[Skipped], target: Target) -> None:
    """Say what a run would do."""
    logger.info("Dry run: nothing is written. A run would fill %s with", target.folder)
    groups = {"cases": cases}
    if not target.images_only:
        groups = {
            f"{what} cases": [case for case in cases if case.part == part]
            for part, what in zip(PARTS, ("training", "test"), strict=True)
        }
    for what, chosen in groups.items():
        if chosen:
            logger.info("  %d %s, %s ... %s", len(chosen), what, chosen[0].id, chosen[-1].id)
    for name, made in zip(target.channels, target.image_paths(cases[0])):
        logger.info("  for instance %s -> %s", cases[0].images.get(name, "zeros"), made.name)
    log_skipped(skipped, None)


def _missing(rows: Sequence[Mapping[str, Any]], info: DatasetInfo) -> dict[str, list[str]]:
    """The channels that cases lack, by the names that dataset.json has for them."""
    return {
        row["case"]: [info.channel_names[name] for name in row["missing_channels"].split(", ")]
        for row in rows
        if row.get("missing_channels")
    }


def _skull_hint(stripped: Sequence[bool], target: Target) -> str:
    """Tell whether the images look as those of pre-training did."""
    if target.strip:
        return "Skull-stripped with HD-BET, as pre-training's images: prepare new images with --skull_strip hd-bet too."
    if all(stripped):
        return "The images look skull-stripped, as pre-training saw them; otherwise, use --skull_strip hd-bet."
    return (
        f"{len(stripped) - sum(stripped)} of {len(stripped)} cases still have their skull, but pre-training saw "
        "skull-stripped brains.\nTo strip them, install HD-BET (pip install 'nnunet_ssl[skullstrip]') and run this "
        "again with: --skull_strip hd-bet"
    )
