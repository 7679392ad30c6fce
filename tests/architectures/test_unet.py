"""The U-Net decoder on an encoder's maps: nnU-Net's own computation, on grids of any size."""

import pytest
import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder

from nnunet_ssl.architectures.networks import SwinUNet
from nnunet_ssl.architectures.unet import PyramidDecoder

SIZES = {"embed_dim": 6, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 3}


def swin_unet(channels=1, classes=2, **options):
    torch.manual_seed(0)
    return SwinUNet(channels, classes, **SIZES, **options)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_on_grids_that_halve_evenly_it_computes_what_nnunets_decoder_computes(deep_supervision):
    network = swin_unet(channels=2, classes=3, deep_supervision=deep_supervision)
    x = torch.randn(1, 2, 32, 16, 48)
    ours, theirs = (
        network(x),
        UNetDecoder.forward(network.decoder, [network.decoder.full_resolution(x), *network.encoder(x)]),
    )
    for own, reference in zip(*([one] if torch.is_tensor(one) else one for one in (ours, theirs)), strict=True):
        assert torch.equal(own, reference)


@pytest.mark.parametrize("size", [(17, 16, 9), (31, 33, 20), (1, 24, 40)])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_every_output_lies_on_the_grid_of_its_stride_whatever_the_size(size, patch_size):
    network = swin_unet(deep_supervision=True, patch_size=patch_size)
    assert network.decoder.output_strides == (1, *network.encoder.strides[:-1])
    outputs = network(torch.randn(1, 1, *size))
    grids = [tuple(-(-length // stride) for length in size) for stride in network.decoder.output_strides]
    assert [tuple(output.shape) for output in outputs] == [(1, 2, *grid) for grid in grids]


def test_deep_supervision_adds_outputs_and_changes_neither_the_finest_nor_the_weights():
    network = swin_unet(deep_supervision=True)
    x = torch.randn(1, 1, 24, 16, 16)
    with torch.no_grad():
        finest, *coarser = network(x)
        network.decoder.deep_supervision = False
        assert torch.equal(network(x), finest) and len(coarser) == 3
    assert network.state_dict().keys() == swin_unet(deep_supervision=False).state_dict().keys()


def test_the_image_reaches_the_logits_at_full_resolution_beside_the_encoder():
    """One voxel, with the encoder's maps held still, changes the places that two 3^3 and one 3^3 kernel reach."""
    decoder = PyramidDecoder(1, (6, 12), (2, 4), num_classes=1, deep_supervision=False).eval()
    for module in decoder.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.register_forward_hook(lambda _, inputs, output: inputs[0])  # norms see the whole image
    maps = [torch.randn(1, 6, 8, 8, 8), torch.randn(1, 12, 4, 4, 4)]
    image = torch.zeros(1, 1, 16, 16, 16)
    changed = image.clone()
    changed[..., 8, 8, 8] = 1
    moved = (decoder(changed, maps) != decoder(image, maps))[0, 0].nonzero()
    assert [8, 8, 8] in moved.tolist() and ((moved - 8).abs() <= 3).all()


def test_no_part_of_the_encoder_is_the_decoders():
    """nnU-Net's own U-Nets hold their encoder inside the decoder."""
    network = swin_unet()
    assert not {id(p) for p in network.encoder.parameters()} & {id(p) for p in network.decoder.parameters()}
