"""Other people's encoders, and their checkpoints as those people write them."""

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

from nnunet_ssl.architectures.swin import SwinEncoder
from nnunet_ssl.weights.monai_names import from_monai

SMALL = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}


def monai_encoder(*, embed_dim, depths, num_heads, window_size, in_channels=1, use_v2=True) -> SwinTransformer:
    """Build MONAI's encoder from SwinEncoder's keywords."""
    return SwinTransformer(
        in_chans=in_channels,
        embed_dim=embed_dim,
        window_size=(window_size,) * 3,
        patch_size=(2, 2, 2),
        depths=depths,
        num_heads=num_heads,
        use_v2=use_v2,
    )


def twin_encoders(*, use_v2=True, **sizes) -> tuple[SwinEncoder, SwinTransformer]:
    """Build ours and MONAI's with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = monai_encoder(**sizes, use_v2=use_v2)
    ours = SwinEncoder(**sizes, conv_norm="instance" if use_v2 else None, mask_token=False)
    state = theirs.state_dict()
    ours.load_state_dict({from_monai(name): state[name] for name in state if "relative_position_index" not in name})
    return ours.double(), theirs.double()


class MaskablePatchEmbedding(nn.Module):
    """What UMBRA puts in the place of MONAI's patch embedding, by its parameters' names."""

    def __init__(self, inner: nn.Module, channels: int):
        super().__init__()
        self.patch_embed = inner
        self.mask_token_injector = nn.Module()
        self.mask_token_injector.mask_token = nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x):
        return self.patch_embed(x)


def umbra_encoder(*, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, groups=8) -> nn.Module:
    """Build UMBRA's encoder from MONAI's: group norms in the conv blocks, and a mask token."""
    torch.manual_seed(1)
    encoder = monai_encoder(embed_dim=embed_dim, depths=depths, num_heads=num_heads, window_size=window_size)
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm3d):
                norm = nn.GroupNorm(min(groups, child.num_features), child.num_features)
                nn.init.normal_(norm.weight, 1, 0.1)
                nn.init.normal_(norm.bias, 0, 0.1)
                setattr(module, name, norm)
    encoder.patch_embed = MaskablePatchEmbedding(encoder.patch_embed, embed_dim)
    return encoder


class UmbraDecoder(nn.Module):
    """UMBRA's FPN and head, by its modules' names and its formulas, for one output channel and patches of 2^3."""

    def __init__(self, channels=(16, 32, 64, 128, 256), width=32):
        super().__init__()
        self.feats_decoder, self.head = nn.Module(), nn.Module()
        for level, one in enumerate(channels, start=1):
            self.feats_decoder.add_module(f"lat{level}", nn.Conv3d(one, width, 1, bias=False))
        for level in range(4, 0, -1):
            smooth = nn.Module()
            smooth.conv, smooth.norm = nn.Conv3d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)
            nn.init.normal_(smooth.norm.weight, 1, 0.1)
            nn.init.normal_(smooth.norm.bias, 0, 0.1)
            self.feats_decoder.add_module(f"smooth{level}", smooth)
        self.head.proj = nn.Conv3d(width, 8, 1)

    def forward(self, maps):
        """From five maps, finest first, to the volume."""
        x = self.feats_decoder.lat5(maps[4])
        for level in range(4, 0, -1):
            lateral, smooth = (self.feats_decoder.get_submodule(f"{part}{level}") for part in ("lat", "smooth"))
            coarser = nn.functional.interpolate(x, size=maps[level - 1].shape[2:], mode="trilinear")
            x = nn.functional.gelu(smooth.norm(smooth.conv(lateral(maps[level - 1]) + coarser)))
        x = self.head.proj(x)
        batch, _, width, height, depth = x.shape
        x = x.view(batch, 1, 2, 2, 2, width, height, depth).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(batch, 1, 2 * width, 2 * height, 2 * depth)


def umbra_checkpoint(encoder: nn.Module, mode: str, decoder: nn.Module | None = None) -> dict:
    """Build the Lightning checkpoint of one of UMBRA's pre-trainings: "contrastive", "masked" or "both".

    Each has the decoder of masked modelling. MAEPretrainer has no argument for the mode, ContrastiveMAEPretrainer none
    for the groups.
    """
    state = {f"model.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"model.{name}": tensor for name, tensor in (decoder or UmbraDecoder()).state_dict().items()}
    settings = {"learning_rate": 1e-4, "mask_ratio": [0.5, 0.75], "extra_swin_kwargs": None, "gn_groups": 8}
    if mode != "masked":
        settings |= {"pretraining_mode": {"contrastive": "contrastive_only", "both": "combined"}[mode]}
    if mode != "masked":
        state |= {f"encoder_m.{name}": tensor + 1 for name, tensor in encoder.state_dict().items()}
        state |= {"projection.0.weight": torch.randn(512, 256), "projection_m.0.weight": torch.randn(512, 256)}
        state |= {"queue": torch.randn(128, 64), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {
        "epoch": 3,
        "global_step": 200_000,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}},
        "hyper_parameters": settings,
    }


RESENC = {"features": (4, 8, 12), "blocks": (1, 2, 1)}


def resenc_unet(features=RESENC["features"], blocks=RESENC["blocks"], in_channels=1) -> ResidualEncoderUNet:
    """Build nnU-Net's ResEnc U-Net as its planner does."""
    torch.manual_seed(2)
    network = ResidualEncoderUNet(
        input_channels=in_channels,
        n_stages=len(features),
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * len(features),
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (len(features) - 1),
        n_blocks_per_stage=blocks,
        num_classes=1,
        n_conv_per_stage_decoder=[1] * (len(features) - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def nnssl_checkpoint(network: nn.Module, **plan) -> dict:
    """Build what nnssl publishes: weights under all aliases, and the adaptation plan."""
    return {
        "network_weights": network.state_dict(),
        "trainer_name": "BaseMAETrainer",
        "citations": [{"type": "Pretraining", "name": "OpenMind", "apa_citations": ["..."]}],
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": "ResEncL",
                "arch_kwargs": None,
                "arch_kwargs_requiring_import": None,
            },
            "pretrain_plan": {
                "dataset_name": "Dataset745_OpenMind",
                "image_reader_writer": "SimpleITKIO",
                "transpose_forward": [0, 1, 2],
                "configurations": {
                    "onemmiso": {
                        "spacing": [1.0, 1.0, 1.0],
                        "normalization_schemes": ["ZScoreNormalization"],
                        "patch_size": [160, 160, 160],
                    }
                },
            },
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": (160, 160, 160),
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
            "key_to_lpe": None,
            **plan,
        },
    }


PRIMUS = {"embed_dim": 24, "depth": 2, "heads": 2}


def primus(input_shape=(32, 32, 32), in_channels=1, num_classes=1) -> Primus:
    """Build dynamic-network-architectures' Primus, a small one of the published kind."""
    torch.manual_seed(3)
    network = Primus(
        in_channels,
        PRIMUS["embed_dim"],
        (8, 8, 8),
        num_classes,
        eva_depth=PRIMUS["depth"],
        eva_numheads=PRIMUS["heads"],
        input_shape=input_shape,
        init_values=0.1,
        scale_attn_inner=True,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def primus_checkpoint(network: nn.Module, **plan) -> dict:
    """Build what nnssl publishes of a Primus, whose adaptation plan KawhiQaQ/ISLES26-StrokeFusion quotes."""
    return nnssl_checkpoint(
        network,
        architecture_plans={"arch_class_name": "Primus", "arch_kwargs": {"eva_numheads": PRIMUS["heads"]}},
        key_to_encoder="eva",
        key_to_stem="down_projection",
        keys_to_in_proj=("down_projection.proj",),
        key_to_lpe="eva.pos_embed",
        **plan,
    )


def asparagus_state(network: nn.Module) -> dict:
    """Give nnU-Net's residual U-Net the names of Asparagus' (gardening_tools 0.3.5, ResidualEncoderUNet)."""
    renamed = {"stem.convs.0.": "stem.conv1.", ".norm.": ".norm_op."}
    state = {}
    for name, tensor in network.encoder.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        state[f"encoder.{name}"] = tensor
    return state


def amaes_checkpoint(network: nn.Module, aliases=True) -> dict:
    """Build the Lightning checkpoint of an AMAES pre-training; older code registers no layer twice."""
    state = {f"model.{name}": tensor for name, tensor in asparagus_state(network).items()}
    state = {name: tensor for name, tensor in state.items() if aliases or "all_modules" not in name}
    state |= {"model.decoder.upsamples.0.weight": torch.randn(12, 8, 2, 2, 2)}
    return {"epoch": 9, "global_step": 1000, "pytorch-lightning_version": "2.5.0", "state_dict": state}


def ssl_head_checkpoint(in_channels=2) -> dict:
    """Build the checkpoint of MONAI's SSLHead as BrainSegFounder has it: DDP's prefix, and the heads of its tasks."""
    torch.manual_seed(4)
    encoder = monai_encoder(**SMALL, in_channels=in_channels, use_v2=False)
    state = {f"module.swinViT.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {"module.rotation_head.weight": torch.randn(4, 192), "module.contrastive_head.weight": torch.randn(8, 192)}
    return {"epoch": 1, "state_dict": state, "optimizer": {}}
