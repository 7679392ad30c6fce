"""The console command of pre-training: ``nnssl_pretrain``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from nnunet_ssl.console import OptionParser, command
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import dataset_folder, folder_of
from nnunet_ssl.pretraining.recipes import about_recipes

logger = logging.getLogger(__name__)

_PRETRAIN_EXAMPLE = """\
examples:
  nnssl_pretrain -c mcl_mim                            on Dataset500 or the only prepared corpus
  nnssl_pretrain -c mcl_mim --c                        go on where it stopped
  nnssl_pretrain -c mim --set recipe=mim_small steps=50000 swin.embed_dim=24
  nnssl_pretrain -c mcl_mim --set recipe=mcl_mim_resenc backbone=resenc
  nnssl_pretrain -c mcl_mim -num_gpus 4
  torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint host:29500 \\
      --no_python nnssl_pretrain -c mcl_mim

Results go to $nnUNet_results/DatasetXXX_NAME/<recipe>/: checkpoint_latest.pth, progress.png, progress.csv, events, and
once it is finished checkpoint_final.pth and encoder.safetensors.
"""


@command
def pretrain() -> None:
    parser = OptionParser(
        prog="nnssl_pretrain",
        description="\n".join(
            [
                "Pre-train an encoder on a prepared corpus.\n\nrecipes, and what they learn:",
                *(f"  {name:<17} {about.learns}" for name, about in about_recipes().items()),
            ]
        ),
        epilog=_PRETRAIN_EXAMPLE,
    )
    parser.add_argument("-c", required=True, metavar="RECIPE", help="one of the recipes above, or a YAML file")
    parser.add_argument("-d", metavar="DATASET", help="the corpus' number or name (default: 500, or the only one)")
    parser.add_argument(
        "--set",
        "-o",  # as it was called in 0.1.0
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings; --print_config shows them all",
    )
    parser.add_argument(
        "--c",
        action="store_true",
        dest="resume",
        help="continue from the latest checkpoint, with the settings the run began with; --set changes them",
    )
    parser.add_argument("-num_gpus", type=int, default=1, metavar="N", help="GPUs of this machine (default: 1)")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="(default: cuda)")
    parser.add_argument("--print_config", action="store_true", help="show the resolved settings and stop")
    arguments = parser.parse_args()
    if arguments.num_gpus < 1:
        parser.error("-num_gpus must be at least 1")

    from nnunet_ssl.pretraining.config import load_config

    recipe, dataset = arguments.c, arguments.d
    if arguments.resume:
        dataset = dataset or _default_corpus()
        recipe = _settings_of_the_run(recipe, dataset, arguments.settings)
    config = load_config(recipe, arguments.settings)
    if arguments.print_config:
        sys.stdout.write(config.as_yaml())
        return
    dataset = dataset or _default_corpus()

    from nnunet_ssl.pretraining.distributed import launch
    from nnunet_ssl.pretraining.loop import pretrain as run

    launch(run, (config, dataset, arguments.resume), processes=arguments.num_gpus, device=arguments.device)


def _settings_of_the_run(recipe: str, dataset: str, overrides: list[str]) -> str | Path:
    """The file of what the run to be continued was told when it began; `recipe` if there is no such run.

    Nothing but the run's name is taken from the recipe: `overrides` may suit the run's settings, and not the recipe's.
    """
    from nnunet_ssl.pretraining.config import values_of
    from nnunet_ssl.pretraining.run.checkpointing import numbered
    from nnunet_ssl.pretraining.run.outputs import CONFIG, results_folder

    name = values_of(recipe, overrides)["recipe"]
    folder = results_folder(dataset_folder(dataset, "nnUNet_preprocessed").name, str(name))
    if not numbered(folder) or not (folder / CONFIG).is_file():
        return recipe
    logger.info("Continuing with the settings in %s, changed by --set alone.", folder / CONFIG)
    return folder / CONFIG


def _default_corpus() -> str:
    """Dataset500 if it is prepared, else the only prepared corpus."""
    from nnunet_ssl.corpus.naming import names_of

    root = folder_of("nnUNet_preprocessed")
    prepared = sorted(path.name for path in root.glob("Dataset*") if names_of(path).is_begun)
    chosen = [name for name in prepared if name.startswith("Dataset500_")] or prepared
    if not prepared:
        raise UserError(f"No corpus is prepared in {root}. Prepare one: nnssl_prepare -d 500")
    if len(chosen) > 1:
        raise UserError(f"Several corpora are prepared in {root}: {', '.join(chosen)}. Choose one with -d.")
    logger.info("No -d given: taking the corpus %s.", chosen[0])
    return chosen[0]
