"""The console command ``nnssl_weights``: look into checkpoints, convert them, fetch them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.console import OptionParser, Subcommands, add_subcommand, command
from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from nnunet_ssl.weights.encoders import LoadReport
    from nnunet_ssl.weights.pretrained import PretrainedEncoder

logger = logging.getLogger(__name__)

FORMATS = ("safetensors", "monai", "nnssl")
DECODERS = {"fpn": "the FPN of masked modelling", "unet": "that of a U-Net"}

_DESCRIPTION = """\
Look into checkpoints of pre-trained encoders, convert them from and to other formats, fetch published ones.
Code in a file is never run: a file that needs it is refused.
"""

_EXAMPLES = {
    "inspect": """\
examples:
  nnssl_weights inspect $nnUNet_results/Dataset500_FOMO60K/mcl_mim/encoder.safetensors
  nnssl_weights inspect checkpoint_final.pth --tensors
""",
    "import": """\
examples:
  nnssl_weights import umbra_mcl_mim.ckpt -o encoder.safetensors
  nnssl_weights import model_swinvit.pt -o encoder.safetensors
  nnssl_weights import my_swin_unetr.pt -o encoder.safetensors --merging monai_1.4

Then fine-tune from it: nnssl_checkpoint=encoder.safetensors nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerSSL
""",
    "export": """\
examples:
  nnssl_weights export checkpoint_latest.pth -o encoder.safetensors
  nnssl_weights export encoder.safetensors -o swin_transformer.pt --format monai
  nnssl_weights export encoder.safetensors -o checkpoint_final.pth --format nnssl
""",
    "card": """\
examples:
  nnssl_weights card $nnUNet_results/Dataset500_FOMO60K/mcl_mim/encoder.safetensors --licence CC-BY-4.0
""",
    "push": """\
examples:
  nnssl_weights push encoder.safetensors -o mcl_mim_fomo60k --licence CC-BY-NC-SA-4.0
  nnssl_weights push encoder.safetensors -o mcl_mim_fomo60k --licence CC-BY-4.0 --repository OWNER/NAME

Writes a folder that nnssl_weights fetch reads. With --repository and a token (HF_TOKEN, or hf auth login) it is
uploaded into a private repository.
""",
    "list": """\
examples:
  nnssl_weights list
  nnssl_weights list openmind-mae
""",
    "fetch": """\
examples:
  nnssl_weights fetch openmind-mae
  nnssl_weights fetch OWNER/REPOSITORY checkpoint.ckpt --recipe mcl_mim
  nnssl_weights fetch https://huggingface.co/OWNER/REPOSITORY --recipe mim
  nnssl_weights fetch /data/shared/checkpoints mcl_mim/encoder.safetensors

Of a name that nnssl_weights list has, writes $nnUNet_results/zoo/NAME/encoder.safetensors, and
nnssl_checkpoint=NAME nnUNetv2_train ... -tr nnUNetTrainerSSL fine-tunes it. Of anything else, writes
$nnUNet_results/DATASET/RECIPE/encoder.safetensors, where the recipe's trainer finds it.
""",
}


@command
def weights() -> None:
    parser = OptionParser(prog="nnssl_weights", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="list | fetch | inspect | import | export | card | push")
    _add_list(commands)
    _add_inspect(commands)
    _add_import(commands)
    _add_export(commands)
    _add_fetch(commands)
    _add_card(commands)
    _add_push(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_origin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--origin", metavar="NAME", help="nnunet_ssl, umbra, monai, nnunet, nnssl or asparagus (default: found out)"
    )


def _add_merging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merging",
        metavar="NAME",
        help="of a Swin encoder whose file does not tell it: monai_1.4 (trained with MONAI up to 1.4), monai (1.5 or "
        "later) or mergingv2",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    _add_origin(parser)
    _add_merging(parser)
    parser.add_argument(
        "--minimum_fraction",
        type=float,
        default=0.9,
        metavar="F",
        help="of the encoder's numbers that must be in the file (default: 0.9)",
    )


def _add_inspect(commands: Subcommands) -> None:
    parser = add_subcommand(commands, "inspect", _inspect, "Say what is in a checkpoint.", _EXAMPLES["inspect"])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of the encoder")
    _add_origin(parser)
    _add_merging(parser)


def _inspect(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.weights.encoders import read_checkpoint

    pretrained = read_checkpoint(arguments.file, arguments.origin, arguments.merging)
    logger.info("%s", describe_encoder(pretrained))
    architecture = dict(pretrained.architecture)
    if architecture.get("merging", "monai") is None:  # tensors fit whatever the merging
        del architecture["merging"]
    pretrained, report = _loaded(dataclasses.replace(pretrained, architecture=architecture), minimum_fraction=0)
    if arguments.tensors:
        for name, tensor in pretrained.tensors.items():
            logger.info("  %-60s %s", name, tuple(tensor.shape))
    logger.info("%s", report)


def _add_import(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "import", _import, "Write the encoder of any checkpoint as a file of our own.", _EXAMPLES["import"]
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.safetensors")
    _add_reading(parser)


def _import(arguments: argparse.Namespace) -> None:
    pretrained, report = _read(arguments.file, arguments)
    _write_own(arguments.o, arguments.file, pretrained, report)


def _add_export(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "export", _export, "Write the encoder of any checkpoint for other software.", _EXAMPLES["export"]
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: tensors and a header that describes them; monai: a state dict of SwinTransformer; "
        "nnssl: a checkpoint with an adaptation plan, for nnUNetv2_preprocess_like_nnssl (default: safetensors)",
    )
    _add_reading(parser)


def _export(arguments: argparse.Namespace) -> None:
    pretrained, report = _read(arguments.file, arguments)
    if arguments.format == "safetensors":
        _write_own(arguments.o, arguments.file, pretrained, report)
    elif arguments.format == "monai":
        from nnunet_ssl.weights.monai_names import monai_state_dict

        _save(arguments.o, monai_state_dict(pretrained))
        _say_what_monai_needs(pretrained)
    else:
        from nnunet_ssl.weights.nnssl import nnssl_checkpoint

        _save(arguments.o, nnssl_checkpoint(pretrained))
        logger.info("The decoder in it is drawn at random: nnU-Net takes the encoder alone.")
    logger.info("written to %s", arguments.o)


def _say_what_monai_needs(pretrained: PretrainedEncoder) -> None:
    has_convs = "stages.0.conv.conv1.weight" in pretrained.tensors
    architecture = pretrained.architecture
    merging = architecture.get("merging", "monai")
    version = "before 1.5" if merging == "monai_1.4" else "1.5 or later"
    downsample = ", downsample='mergingv2'" if merging == "mergingv2" else ""
    logger.info(
        "A state dict for monai.networks.nets.swin_unetr.SwinTransformer(use_v2=%s%s) of MONAI %s.",
        has_convs, downsample, version,
    )  # fmt: skip
    if "stages.0.conv.norm1.weight" in pretrained.tensors:
        groups = architecture.get("conv_groups", 8)
        logger.info(
            "Replace its InstanceNorms by torch.nn.GroupNorm(%d, channels) first: these weights need them.", groups
        )
    if "mask_token" in pretrained.tensors:
        logger.info("The mask token is left out: MONAI's class has none.")


def _add_list(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "list", _list, "Show the published encoders that can be fetched by name.", _EXAMPLES["list"]
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="say all of this one")


def _list(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.weights.zoo import describe_entries, describe_entry, entry_of

    logger.info("%s", describe_entry(entry_of(arguments.name)) if arguments.name else describe_entries())


def _add_fetch(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "fetch", _fetch, "Put a published encoder where the trainers look for it.", _EXAMPLES["fetch"]
    )
    parser.add_argument(
        "source",
        metavar="NAME_OR_REPO_OR_PATH",
        help="a name of nnssl_weights list, an id or web address on Hugging Face, or a local folder or file",
    )
    parser.add_argument("filename", nargs="?", metavar="FILENAME", help="inside it, if it holds several")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository")
    parser.add_argument("--recipe", metavar="NAME", help="whose trainer shall find it (default: the file's method)")
    parser.add_argument(
        "-d", default="Dataset500_FOMO60K", metavar="DATASET", help="name or id, for the folder (default: %(default)s)"
    )
    _add_reading(parser)


def _fetch(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.nnunet_folders import full_name
    from nnunet_ssl.weights.fetching import destination, locate
    from nnunet_ssl.weights.pretrained import UMBRAS_RECIPES

    if "/" not in arguments.source and not Path(arguments.source).expanduser().exists():
        _fetch_entry(arguments)  # only published weights go by a name without an owner
        return
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error at the end says enough
    dataset = full_name(arguments.d)
    file = locate(arguments.source, arguments.filename, arguments.revision)
    pretrained, report = _read(file, arguments)
    own = (pretrained.method,) if pretrained.origin == "nnunet_ssl" and pretrained.method else ()
    candidates = UMBRAS_RECIPES.get(pretrained.method or "", own)
    if arguments.recipe is None and len(candidates) != 1:
        known = f" It may be: {', '.join(candidates)}." if candidates else ""
        raise UserError(f"{file} does not say by which recipe it was trained.{known} Say it: --recipe mcl_mim")
    recipe = arguments.recipe or candidates[0]
    if not pretrained.may_be_of(recipe):
        logger.warning(
            "The file says that its weights were trained by %s; the recipe %s is another.", pretrained.method, recipe
        )
    _write_own(destination(recipe, dataset), file, pretrained, report)


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="encoder.safetensors")
    parser.add_argument("--licence", metavar="NAME", help="of the weights, such as CC-BY-4.0 (default: unstated)")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="on Hugging Face")
    parser.add_argument(
        "-d", metavar="CORPUS", help="name of the corpus whose audits count (default: of the file's folder)"
    )


def _add_card(commands: Subcommands) -> None:
    parser = add_subcommand(commands, "card", _card, "Write the model card of an encoder.", _EXAMPLES["card"])
    _add_sharing(parser)
    parser.add_argument("-o", type=Path, metavar="README.md", help="(default: to the terminal)")


def _add_push(commands: Subcommands) -> None:
    parser = add_subcommand(
        commands, "push", _push, "Write a folder ready for Hugging Face, and upload it if asked.", _EXAMPLES["push"]
    )
    _add_sharing(parser)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER")


def _own_encoder(arguments: argparse.Namespace) -> tuple[Path, PretrainedEncoder, str]:
    """Read what is to be shared, and write its card."""
    from nnunet_ssl.weights.encoders import read_checkpoint
    from nnunet_ssl.weights.pretrained import encoder_file
    from nnunet_ssl.weights.sharing import model_card, verdicts_of

    file = encoder_file(arguments.file)
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is no encoder file of this package. Make one of it: nnssl_weights import {file} -o ..."
        )
    pretrained = read_checkpoint(file, "nnunet_ssl")
    verdicts = verdicts_of(file, arguments.d)
    return (
        file,
        pretrained,
        model_card(pretrained, verdicts, licence=arguments.licence, repository=arguments.repository),
    )


def _card(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.files import written_beside

    _, _, card = _own_encoder(arguments)
    if arguments.o is None:
        logger.info("%s", card)
        return
    with written_beside(arguments.o) as path:
        path.write_text(card)
    logger.info("written to %s", arguments.o)


def _push(arguments: argparse.Namespace) -> None:
    from nnunet_ssl.weights.sharing import upload, write_folder

    file, pretrained, card = _own_encoder(arguments)
    write_folder(arguments.o, file, pretrained, card)
    logger.info("%s is ready: read README.md, and complete what it does not know.", arguments.o)
    if "Unstated" in card:
        logger.warning("The card states no licence: say one with --licence.")
    if arguments.repository is None:
        logger.info(
            "Upload it: nnssl_weights push ... --repository OWNER/NAME, or hf upload OWNER/NAME %s", arguments.o
        )
        return
    address = upload(arguments.o, arguments.repository)
    if address is None:
        raise UserError(
            f"There is no token of Hugging Face, so {arguments.o} was not uploaded. Set HF_TOKEN, or: hf auth login"
        )
    logger.info("uploaded to %s, which is private until you open it", address)


def _fetch_entry(arguments: argparse.Namespace) -> None:
    """Fetch published weights by name; a file that was brought by hand is taken as it is."""
    from nnunet_ssl.weights.fetching import locate_entry
    from nnunet_ssl.weights.pretrained import ENCODER
    from nnunet_ssl.weights.zoo import describe_licence, entry_of, folder_for

    entry = entry_of(arguments.source)
    given = [name for name in ("filename", "recipe", "origin") if getattr(arguments, name)]
    if given:
        raise UserError(f"{entry.name} is a name of the table, which tells its {' and '.join(given)} already.")
    target = folder_for(entry.name) / ENCODER
    if entry.refused:
        raise UserError(f"{entry.name} cannot be used: {entry.refused}.")
    if target.exists():
        raise UserError(f"{entry.name} was fetched already: {target}. Remove it to fetch it again.")
    logger.info("%s", describe_licence(entry))
    file = locate_entry(entry, arguments.revision)
    arguments.merging = arguments.merging or entry.merging
    pretrained, report = _read(file, arguments)
    if pretrained.origin != entry.origin:
        raise UserError(f"{file} is of {pretrained.origin}; {entry.name} should be of {entry.origin}: another file?")
    metadata = {"zoo": entry.as_metadata() | ({"revision": arguments.revision} if arguments.revision else {})}
    pretrained = dataclasses.replace(
        pretrained, method=entry.recipe or pretrained.method, metadata={**metadata, **pretrained.metadata}
    )
    _write_own(target, file, pretrained, report)
    logger.info(
        "Fine-tune from it: nnssl_checkpoint=%s nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerSSL", entry.name
    )


def _read(file: Path, arguments: argparse.Namespace) -> tuple[PretrainedEncoder, LoadReport]:
    from nnunet_ssl.weights.encoders import read_checkpoint

    return _loaded(read_checkpoint(file, arguments.origin, arguments.merging), arguments.minimum_fraction)


def _loaded(pretrained: PretrainedEncoder, minimum_fraction: float) -> tuple[PretrainedEncoder, LoadReport]:
    """Load an encoder into a network of its architecture, which shows whether it is whole.

    What is returned has the tensors that were loaded, each once, by the network's names.
    """
    from nnunet_ssl.architectures.networks import build_encoder
    from nnunet_ssl.weights.encoders import load_encoder

    encoder = build_encoder(pretrained.architecture)
    report = load_encoder(encoder, pretrained, minimum_fraction=minimum_fraction)
    state = encoder.state_dict()
    return dataclasses.replace(pretrained, tensors={name: state[name] for name in report.loaded}), report


def _write_own(path: Path, source: Path, pretrained: PretrainedEncoder, report: LoadReport) -> None:
    from nnunet_ssl.weights.encoders import write_encoder

    if path.suffix != ".safetensors":
        raise UserError(f"{path} is to be a safetensors file: give it the suffix .safetensors.")
    imported = {"file": source.name, "origin": pretrained.origin}
    write_encoder(
        path,
        pretrained.tensors,
        architecture=pretrained.architecture,
        method=pretrained.method,
        step=pretrained.step,
        preprocessing=pretrained.preprocessing,
        metadata={"imported": imported, **pretrained.metadata},
        decoder=pretrained.decoder,
    )
    logger.info("%s\n%s\nwritten to %s", describe_encoder(pretrained), report, path)


def _save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors as safetensors if the name asks for it, else what ``torch.load`` reads."""
    import torch
    from safetensors.torch import save

    from nnunet_ssl.files import written_beside

    with written_beside(path) as temporary:
        if path.suffix == ".safetensors" and "network_weights" not in content:
            temporary.write_bytes(save({name: tensor.contiguous().clone() for name, tensor in content.items()}))
        else:
            torch.save(content, temporary)


def describe_encoder(pretrained: PretrainedEncoder) -> str:
    """Return what a reader wants to know of an encoder, a line for each thing."""
    from nnunet_ssl.weights.decoders import kind_of
    from nnunet_ssl.weights.origins import DESCRIPTIONS

    kind = kind_of(pretrained.decoder)
    lines = {
        "origin": f"{pretrained.origin}, {DESCRIPTIONS[pretrained.origin]}",
        "family": str(pretrained.metadata.get("family") or pretrained.origin),
        "method": f"{pretrained.method or 'unknown'}, {pretrained.step or 'unknown'} steps",
        "architecture": _listed(pretrained.architecture),
        "preprocessing": _listed(pretrained.preprocessing or {}) or "unknown",
        "metadata": ", ".join(pretrained.metadata) or "none",
        "tensors": _counted(pretrained.tensors),
        "decoder": f"{DECODERS[kind]}: {_counted(pretrained.decoder)}" if kind else "none that could be loaded",
        "beside it": ", ".join(f"{module} ({number})" for module, number in pretrained.left_out.items()) or "nothing",
    }
    architecture = pretrained.architecture
    assumptions = [f"{key} {architecture[key]} ({why})" for key, why in pretrained.assumed.items()]
    if architecture.get("merging", "") is None:
        assumptions.append("merging unknown: using these weights takes --merging monai_1.4, monai or mergingv2")
    if assumptions:
        lines["NOT TOLD"] = "; ".join(assumptions)
    indent = " " * 15
    return "\n".join(textwrap.fill(f"{name:<14} {text}", 120, subsequent_indent=indent) for name, text in lines.items())


def _counted(tensors: dict[str, Tensor]) -> str:
    return f"{len(tensors)}, of {sum(tensor.numel() for tensor in tensors.values()):,} numbers"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
