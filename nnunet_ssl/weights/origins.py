"""Whose checkpoint is this, and where in it is the encoder: the layouts of the files that can be read.

The encoder is found by the name of one of its tensors, wherever in a network it sits, and its architecture follows from
the tensors. What else a file tells (steps, recipe, preprocessing) differs with its origin; that is what the readers
are for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.architectures.backbones import known
from nnunet_ssl.architectures.backbones.primus import PRIMUS
from nnunet_ssl.architectures.backbones.resenc import RESENC
from nnunet_ssl.architectures.backbones.swin import SWIN
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.decoders import decoder_beside
from nnunet_ssl.weights.monai_names import from_monai
from nnunet_ssl.weights.pretrained import DESCRIBED, FORMAT, UMBRAS_RECIPES, PretrainedEncoder
from nnunet_ssl.weights.safe_files import CheckpointFile

MONAI_SWIN = "layers1.0.blocks.0.attn.qkv.weight"
ASPARAGUS = "stem.conv1.conv.weight"
ANCHORS = {
    SWIN.anchor: FORMAT,
    MONAI_SWIN: "monai",
    RESENC.anchor: "nnunet",
    PRIMUS.anchor: "nnssl",
    ASPARAGUS: "asparagus",
}
"""A tensor that every encoder of a kind has, and whose a file is that tells nothing else."""

TOP_MODULES = ("patch_embed.", "mask_token", "layers", "stages.", "stem.", "down_projection.", "eva.", "register_tok")
"""What the names of an encoder of :data:`ANCHORS` begin with, where the encoder is not part of a network."""

FOREIGN_NETWORKS = {
    "patch_embedding.position_embeddings": "MONAI's ViT, as BrainIAC has it: no map is finer than its patches of 16^3",
    "in_conv.conv1.conv.weight": "the U-Net of FOMO25's baseline",
    "layer1.0.conv1.weight": "a ResNet, as MedicalNet, 3D-Neuro-SimCLR and older BrainIAC have it",
}
"""By a tensor's name: networks that people publish and that are no backbone here, to be refused by their names."""

COPIES = ("encoder_m", "key", "decoder")
"""Modules that hold the encoder a second time: UMBRA's and our moving averages, the alias in nnU-Net's decoder."""

BEFORE_MONAI_1_5 = re.compile(
    r"model_swinvit|swin_unetr\.(base|small|tiny)_5000ep|swin_unetr_btcv|fold\d_f\d+_ep300_4gpu|model_bestValRMSE"
    r"|model_weights_(UKB|BRATS|ATLAS)-pretrain|ATLAS-finetune|best_swin_model",
    re.IGNORECASE,
)
"""Names, of the file or its folder, of weights from before MONAI 1.5: MONAI's self-supervised ones, its Swin UNETRs of
BTCV and BraTS 2021, BrainSegFounder, SwinBrain."""

SSL_HEAD = "MONAI's SSLHead: BrainSegFounder and other pretext tasks of Swin UNETR"
OPENMIND = "OpenMind, or SSL3D, whose teams trained on it"
OPENMINDS_DATASETS = ("Dataset745_OpenMind", "Dataset745_OpenNeuro_v2")

STATE_DICTS = ("network_weights", "learner", "state_dict", "model_state_dict", "model", "net")
"""Where checkpoints keep their tensors; a file may also be a state dict itself."""


def recognise(file: CheckpointFile) -> str:
    """Return the origin of a file, a key of :data:`READERS`.

    Raises:
        UserError: it holds no encoder of a kind that is known here.
    """
    content = file.content
    if FORMAT in (file.header.get("format"), content.get("format")):
        return FORMAT
    if "nnssl_adaptation_plan" in content or "pretrain_json" in _section(content, "init_args"):
        return "nnssl"
    if "trainer_name" in content:
        return "nnunet"
    settings = _section(content, "hyper_parameters")
    if "use_swinunetr" in settings or settings.get("pretraining_mode") in UMBRAS_RECIPES:
        return "umbra"
    state = state_dict(content)
    if any("mask_token_injector" in name or "feats_decoder" in name or "encoder_m" in name for name in state):
        return "umbra"
    for anchor, origin in ANCHORS.items():
        if _places(state, anchor):
            return origin
    raise UserError(_nothing_known(state))


def _read_own(file: CheckpointFile) -> PretrainedEncoder:
    """Read ``encoder.safetensors``, described in its header, or a checkpoint of a pre-training."""
    try:
        header = {key: json.loads(text) for key, text in file.header.items() if key in DESCRIBED}
    except json.JSONDecodeError as error:
        raise UserError(f"its header cannot be read ({error}).") from error
    described = header or {key: file.content[key] for key in DESCRIBED if key in file.content}
    for key, value in described.items():
        if value is not None and not isinstance(value, DESCRIBED[key]):
            raise UserError(f"its header is not as this package writes it: {key} is {value!r}.")
    tensors, decoder, left_out = _encoder(state_dict(file.content), *_own_anchors())
    metadata = described["metadata"] = described.get("metadata") or {}
    architecture = described["architecture"] = dict(described.get("architecture") or _architecture(tensors))
    assumed: dict[str, str] = {}
    imported = _section(metadata, "imported")
    if imported.get("origin") == "monai" and "merging" not in architecture:  # before architectures had mergings
        architecture["merging"], assumed = _merging_of_monai(str(imported.get("file")), tensors)
        if architecture["merging"] is None:
            why = "as before architectures told it; the weights are MONAI's, and --merging may overrule it"
            architecture["merging"], assumed = "monai", {"merging": why}
    return PretrainedEncoder(
        tensors=tensors, decoder=decoder, origin=FORMAT, left_out=left_out, assumed=assumed, **described
    )


def _read_monai(file: CheckpointFile) -> PretrainedEncoder:
    state = state_dict(file.content)
    tensors, _, left_out = _encoder(state, MONAI_SWIN)
    architecture = _architecture(tensors)
    if architecture["conv_norm"] == "group":
        raise UserError(
            "the norms of its conv blocks have weights, which MONAI's have not, and it does not tell of which kind "
            "they are (group norms, of how many groups, or others). Take the file that it was made from, if that tells."
        )
    architecture["merging"], assumed = _merging_of_monai("/".join(file.path.absolute().parts[-2:]), state)
    pretext = {"rotation_head", "contrastive_head", "contrastive_pre"} & {
        part for m in left_out for part in m.split(".")
    }
    return PretrainedEncoder(
        tensors=tensors,
        architecture=architecture,
        origin="monai",
        metadata=_known(family=SSL_HEAD if pretext or "swinViT.mask_token" in state else None),
        left_out=left_out,
        assumed=assumed,
    )


def _merging_of_monai(name: str, names: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Return the merging that weights were trained with, None where nothing tells it, and why it was assumed.

    Args:
        name: of the file and its folder.
        names: of its tensors; only weights published long before MONAI 1.5 call the layers of an MLP fc1 and fc2.
    """
    if BEFORE_MONAI_1_5.search(name) or any(".mlp.fc1." in tensor for tensor in names):
        return "monai_1.4", {"merging": f"{name} is known to be from before MONAI 1.5; --merging overrules it"}
    return None, {}


def _read_umbra(file: CheckpointFile) -> PretrainedEncoder:
    """Read a Lightning checkpoint. Whether its pairs were of one or of two modalities, it does not say."""
    content, state = file.content, state_dict(file.content)
    settings = _section(content, "hyper_parameters")
    tensors, decoder, left_out = _encoder(state, MONAI_SWIN)
    if "mask_token" in tensors:
        tensors["mask_token"] = tensors["mask_token"].reshape(-1)
    architecture = _architecture(tensors)
    # UMBRA pins MONAI 1.5.1; another merging than its default is a keyword of SwinTransformer.
    downsample = _section(settings, "extra_swin_kwargs").get("downsample", "merging")
    architecture["merging"] = {"merging": "monai", "mergingv2": "mergingv2"}.get(str(downsample))
    assumed: dict[str, str] = {}
    if architecture["conv_norm"] == "group":
        architecture["conv_groups"] = _umbras_groups(settings, tensors)
        if "gn_groups" not in settings:
            assumed["conv_groups"] = "UMBRA's default; the file does not tell the groups of its group norms"
    mode = _umbras_mode(settings, state)
    branches = _umbras_branches(mode, state)
    # Every model has the decoder, which only masked modelling trains; one of its norms alone follows gn_groups.
    as_ours = "masked" in branches and settings.get("gn_groups", 8) == 8
    return PretrainedEncoder(
        tensors=tensors,
        decoder=decoder if as_ours else {},
        architecture=architecture,
        origin="umbra",
        method=mode,
        step=plain(content.get("global_step")),
        metadata=_known(
            branches=branches,
            epoch=content.get("epoch"),
            hyper_parameters=settings,
        ),
        left_out=left_out,
        assumed=assumed,
    )


def _umbras_mode(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> str | None:
    """Return the pre-training's mode, in UMBRA's words, "finetuned" for a segmentation network, None if nothing tells.

    Every model has the decoder of masked modelling, whatever its mode. Those with a queue tell their mode in the
    settings; the one without has the masked branch alone.
    """
    if "encoder_prefix_in_ckpt" in settings:
        return "finetuned"
    if settings.get("pretraining_mode") in UMBRAS_RECIPES:
        return settings["pretraining_mode"]
    masked_alone = "queue" not in state and any("feats_decoder" in name for name in state)
    return "mae_only" if masked_alone else None


def _umbras_branches(mode: str | None, state: Mapping[str, Tensor]) -> list[str]:
    contrastive, masked = mode in ("contrastive_only", "combined") or "queue" in state, mode in ("mae_only", "combined")
    return ["contrastive"] * contrastive + ["masked"] * masked


def _umbras_groups(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return how many groups the GroupNorms of the conv blocks have."""
    if "mask_token" not in tensors:
        raise UserError(
            "the norms of its conv blocks have weights, but it has no mask token, so they are not UMBRA's, and it does "
            "not tell of which kind they are."
        )
    groups = settings.get("gn_groups", 8)
    widths = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".conv.norm1.weight")]
    # UMBRA takes no more groups than there are channels, SwinEncoder none that do not divide them.
    if not isinstance(groups, int) or groups < 1 or any(min(groups, one) != math.gcd(groups, one) for one in widths):
        raise UserError(f"SwinEncoder cannot have {plain(groups)} groups in the norms of {widths} channels, as it has.")
    return groups


def _read_nnunet(file: CheckpointFile) -> PretrainedEncoder:
    """Read the encoder of a network that nnU-Net trained: one that this package fine-tuned, or nnU-Net's ResEnc."""
    content, arguments = file.content, _section(file.content, "init_args")
    plans = _section(arguments, "plans")
    configuration = _section(plans, "configurations", arguments.get("configuration"))
    network = _section(configuration, "architecture", "arch_kwargs")
    _refuse_other_strides(network)
    tensors, decoder, left_out = _encoder(state_dict(content), *_own_anchors())
    return PretrainedEncoder(
        tensors=tensors,
        decoder=decoder,
        architecture=_architecture(tensors) | {key: network[key] for key in UNSEEN if key in network},
        origin="nnunet",
        method=plain(content.get("trainer_name")),
        preprocessing=_preprocessing(plans, configuration),
        metadata=_known(
            dataset=plans.get("dataset_name"),
            plans=plans.get("plans_name"),
            configuration=arguments.get("configuration"),
            fold=arguments.get("fold"),
            epoch=content.get("current_epoch"),
            pretrained=_section(plans, "nnunet_ssl", "pretrained"),
        ),
        left_out=left_out,
    )


def _read_nnssl(file: CheckpointFile) -> PretrainedEncoder:
    """Read a checkpoint of nnssl, whose adaptation plan says where the encoder is and what scans it has seen."""
    content, state = file.content, state_dict(file.content)
    plan = _section(content, "nnssl_adaptation_plan")
    architecture = _section(plan, "architecture_plans")
    if _places(state, PRIMUS.anchor):
        return _read_primus(content, state)
    _refuse_other_strides(_section(architecture, "arch_kwargs"))
    place = plan["key_to_encoder"].removesuffix("stages") if plan.get("key_to_encoder") else None
    tensors, decoder, left_out = _encoder(state, RESENC.anchor, place=place)
    pretraining = _section(plan, "pretrain_plan")
    configuration: Mapping[str, Any] = next(iter(_section(pretraining, "configurations").values()), {})
    return PretrainedEncoder(
        tensors=tensors,
        decoder=decoder,
        architecture=_architecture(tensors),
        origin="nnssl",
        method=plain(content.get("trainer_name")),
        preprocessing=_preprocessing(pretraining, configuration),
        metadata=_known(
            family=OPENMIND if pretraining.get("dataset_name") in OPENMINDS_DATASETS else None,
            nnssl_adaptation_plan=plan,
            citations=content.get("citations"),
        ),
        left_out=left_out,
    )


def _read_primus(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> PretrainedEncoder:
    """Read the transformer of an nnssl checkpoint; heads are told by the plan, or known of the published sizes."""
    plan = _section(content, "nnssl_adaptation_plan")
    pretraining = _section(plan, "pretrain_plan")
    arguments = _section(plan, "architecture_plans", "arch_kwargs")
    tensors, _, left_out = _encoder(state, PRIMUS.anchor)
    architecture = _architecture(tensors)
    heads = [arguments[key] for key in ("eva_numheads", "encoder_eva_numheads") if key in arguments]
    return PretrainedEncoder(
        tensors=tensors,
        architecture=architecture | {"heads": plain(heads[0]) if heads else architecture["heads"]},
        origin="nnssl",
        method=plain(content.get("trainer_name")),
        preprocessing=_preprocessing(pretraining, next(iter(_section(pretraining, "configurations").values()), {})),
        metadata=_known(
            family=OPENMIND if pretraining.get("dataset_name") in OPENMINDS_DATASETS else None,
            nnssl_adaptation_plan=plan,
            citations=content.get("citations"),
        ),
        left_out=left_out,
    )


def _read_asparagus(file: CheckpointFile) -> PretrainedEncoder:
    """Read a Lightning checkpoint of Asparagus, FOMO's code: nnU-Net's residual encoder under other names."""
    content = file.content
    tensors, _, left_out = _encoder(state_dict(content), ASPARAGUS)
    return PretrainedEncoder(
        tensors=tensors,
        architecture=_architecture(tensors),
        origin="asparagus",
        method="AMAES" if "model.decoder" in left_out else None,
        step=plain(content.get("global_step")),
        metadata=_known(epoch=content.get("epoch"), hyper_parameters=_section(content, "hyper_parameters")),
        left_out=left_out,
    )


def from_asparagus(name: str) -> str:
    """Return ResEncEncoder's name of a tensor of Asparagus' residual encoder (gardening_tools, ResidualEncoderUNet)."""
    name = name.replace("stem.conv1.", "stem.convs.0.", 1) if name.startswith("stem.") else name
    return name.replace(".norm_op.", ".norm.")


READERS: dict[str, Callable[[CheckpointFile], PretrainedEncoder]] = {
    FORMAT: _read_own,
    "umbra": _read_umbra,
    "monai": _read_monai,
    "nnunet": _read_nnunet,
    "nnssl": _read_nnssl,
    "asparagus": _read_asparagus,
}
"""By origin: how to read its files. All raise UserError where a file has no encoder that can be built here."""

DESCRIPTIONS = {
    FORMAT: "an encoder file or a pre-training's checkpoint of this package",
    "umbra": "a Lightning checkpoint of UMBRA, the code of arXiv 2511.11311",
    "monai": "a state dict of MONAI's SwinUNETR or SwinTransformer",
    "nnunet": "an nnU-Net checkpoint: fine-tuned by this package, or a ResEnc U-Net",
    "nnssl": "a checkpoint of nnssl (OpenMind, SSL3D, nnFoundation)",
    "asparagus": "a Lightning checkpoint of Asparagus, FOMO's code (AMAES)",
}


def state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by their names without wrappers, see :func:`unwrapped_name`.

    Raises:
        UserError: there are none.
    """
    for holder in (*(content.get(key) for key in STATE_DICTS), content):
        if isinstance(holder, Mapping):
            tensors = {unwrapped_name(name): value for name, value in holder.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
    raise UserError(f"it has no tensors; it has: {', '.join(map(str, list(content)[:8])) or 'nothing'}.")


UNSEEN = ("merging", "conv_groups", "heads", "grid")
"""Keys of an architecture that leave no trace in tensors."""


def _section(content: Mapping[str, Any], *keys: Any) -> Mapping[str, Any]:
    """Return the mapping that lies at `keys`, one in the other; an empty one if there is none."""
    found: Any = content
    for key in keys:
        found = found.get(key)
        if not isinstance(found, Mapping):
            return {}
    return found


def unwrapped_name(name: str) -> str:
    """Return a tensor's name without the wrappers around modules: DDP's, torch.compile's and `channels.Pooled`'s."""
    return ".".join(part for part in str(name).split(".") if part not in ("module", "_orig_mod"))


def _places(state: Mapping[str, Tensor], anchor: str) -> list[str]:
    """Return the prefixes of all encoders that have the tensor `anchor`; copies are left aside."""
    found = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]
    return [place for place in found if not set(place.split(".")) & set(COPIES)]


def _encoder(
    state: Mapping[str, Tensor], *anchors: str, place: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Return the tensors of an encoder, and of a decoder beside it, by the names they have here, and the number of
    tensors beside the encoder by module.

    Args:
        state: of the whole network.
        anchors: of the kinds of encoders to look for.
        place: the prefix of the encoder, where the file says it.
    """
    found = {prefix: anchor for anchor in anchors for prefix in _places(state, anchor) if place in (None, prefix)}
    if not found:
        raise UserError(_nothing_known(state))
    if len(found) > 1:
        raise UserError(f"it holds several encoders, at {', '.join(found)}; store the one that is meant alone.")
    ((prefix, anchor),) = found.items()
    decoder = decoder_beside(state, prefix)
    ours = prefix or (TOP_MODULES if anchor in ANCHORS else "")
    inside = [name for name in state if name.startswith(ours) and name not in decoder]
    if anchor == PRIMUS.anchor:
        inside = [name for name in inside if name[len(prefix) :].startswith(TOP_MODULES)]  # not the decoder beside it
    left_out = Counter(_module(name) for name in state.keys() - set(inside))
    rename = {MONAI_SWIN: from_monai, ASPARAGUS: from_asparagus}.get(anchor, str)
    # The indices of relative positions are constants, which SwinEncoder computes.
    kept = [name for name in inside if not name.endswith("relative_position_index")]
    check_finite({name: state[name] for name in kept})
    encoder = {rename(name[len(prefix) :]): state[name] for name in kept}
    return encoder, {here: state[name] for name, here in decoder.items()}, dict(sorted(left_out.items()))


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not finite, or not in float32, which the encoders compute in."""
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.to(torch.float32).isfinite().sum())
        if bad:
            raise UserError(
                f"{bad} of the {tensor.numel()} numbers of its tensor {name} are not finite: a training that failed. "
                "Take an earlier checkpoint."
            )


def _module(name: str) -> str:
    """Return the module that a tensor belongs to, one level below the parts of a training."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("model", "query", "key") else parts[0]


def _nothing_known(state: Mapping[str, Tensor]) -> str:
    for anchor, what in FOREIGN_NETWORKS.items():
        if _places(state, anchor):
            return f"it holds {what}; the backbones here are Swin, nnU-Net's residual encoder and Primus."
    return f"it holds no encoder of a kind known here; its first tensors are {', '.join(list(state)[:3])}."


def _own_anchors() -> list[str]:
    return [backbone.anchor for backbone in known().values()]


def _architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return next((one for one in known().values() if one.anchor in tensors), SWIN).infer(tensors)


def _refuse_other_strides(arguments: Mapping[str, Any]) -> None:
    """Tensors do not tell a stage's stride; where a file does, it must be the one that ResEncEncoder has."""
    strides = arguments.get("strides") or []
    wanted = [1] + [2] * (len(strides) - 1)
    if any(np.any(np.asarray(stride) != one) for stride, one in zip(strides, wanted)):
        raise UserError(
            f"its stages have the strides {plain(strides)}; the residual encoder here keeps the grid in its first "
            "stage and halves every axis in each further one."
        )


def _preprocessing(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what nnU-Net's or nnssl's plans tell of how scans were prepared."""
    known = _known(
        image_reader_writer=plans.get("image_reader_writer"),
        transpose_forward=plans.get("transpose_forward"),
        **{key: configuration.get(key) for key in ("spacing", "normalization_schemes", "use_mask_for_norm")},
    )
    return known or None


def _known(**values: Any) -> dict[str, Any]:
    """Return, in JSON's types, the values that are there."""
    values = {key: plain(value) for key, value in values.items()}
    return {key: value for key, value in values.items() if value not in (None, {}, [])}


def plain(value: Any) -> Any:
    """Return nested containers with NumPy's values, tensors and tuples turned into JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
