"""Networks for any subset of channels: which channels count where, and what the network makes of those."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_ssl.architectures.channels import BLOCK, WAYS, Pooled, channels_in_view, scaled_by_presence, without_absent
from nnunet_ssl.weights.nnssl import unet_arguments

SWIN = {"embed_dim": 6, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "mask_token": False}
RESENC = unet_arguments({"features": [4, 6, 8], "blocks": [1, 1, 1]})
NETWORKS = {
    "swin": ("nnunet_ssl.architectures.networks.SwinFPN", SWIN, []),
    "swin_unet": ("nnunet_ssl.architectures.networks.SwinUNet", SWIN, []),
    "resenc": (
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        RESENC,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
    ),
}
FACTORY = "nnunet_ssl.architectures.channels.any_channels"
SIZE = (16, 24, 20)
every_network = pytest.mark.parametrize("kind", NETWORKS)
every_way = pytest.mark.parametrize("way", WAYS)
every_pooling = pytest.mark.parametrize("way", ["pooled", "modulated"])
LEARNED = ("gates", "scales", "shifts")


def build(kind, way=None, channels=3):
    """Build a network as stock nnU-Net does; without a way, the plain one."""
    torch.manual_seed(0)
    path, arguments, imports = NETWORKS[kind]
    added = {"channels": way, "network": path} if way else {}
    return get_network_from_plans(
        FACTORY if way else path, arguments | added, imports, channels, 2, deep_supervision=False
    ).eval()


def scans(channels=3, size=SIZE, seed=0):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def of_one_channel(network, kind, image):
    """What the plain network for one channel, with a pooling network's weights, makes of an image."""
    plain = build(kind, channels=1)
    weights = {name.replace(".module.", "."): value for name, value in network.state_dict().items()}
    plain.load_state_dict({name: value for name, value in weights.items() if not set(name.split(".")) & set(LEARNED)})
    return plain(image)


@every_network
@every_pooling
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:4])
def test_pooling_knows_no_order_of_channels(kind, way, order):
    network, x = build(kind, way), scans()
    x[0, 1] = 0
    x[1, 2, :8] = 0
    with torch.no_grad():
        torch.testing.assert_close(network(x[:, list(order)]), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["swin_unet", "resenc"])
def test_modulated_channels_are_known_by_their_own_scales_and_shifts_and_by_nothing_else(kind):
    network, x, order = build(kind, "modulated"), scans(), [2, 0, 1]
    x[0, 1] = 0
    learned = {name: value for name, value in network.named_parameters() if {"scales", "shifts"} & set(name.split("."))}
    assert len(learned) == 2 * sum("gates" in name for name, _ in network.named_parameters())
    with torch.no_grad():
        for value in learned.values():
            value += 0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value)))
        expected = network(x)
        assert not torch.allclose(network(x[:, order]), expected)
        for value in learned.values():
            value.copy_(value[order])
        torch.testing.assert_close(network(x[:, order]), expected, rtol=1e-4, atol=1e-5)


def test_a_modulated_map_is_scaled_and_shifted_by_its_channel_and_one_that_is_absent_adds_nothing():
    x, module = scans(3, (16, 16, 16)), torch.nn.AvgPool3d(4)
    x[:, 1] = 0
    pooled = Pooled(module, [1], modulated=3)
    with torch.no_grad():
        pooled.gates[0].fill_(0.25)
        pooled.scales[0].copy_(torch.tensor([[2.0], [5.0], [-1.0]]))
        pooled.shifts[0].copy_(torch.tensor([[0.1], [9.0], [0.3]]))
        first, third = 2 * module(x[:, :1]) + 0.1, -module(x[:, 2:]) + 0.3
        mean = (first + third) / 2
        torch.testing.assert_close(pooled(x), mean + 0.25 * (torch.maximum(first, third) - mean))


@every_pooling
def test_pooled_maps_keep_the_type_that_autocast_chose(way):
    network = build("swin", way)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone, pooled = network.encoder.module(scans(channels=1)), network.encoder(scans())
    assert [level.dtype for level in pooled] == [level.dtype for level in alone]
    assert torch.bfloat16 in {level.dtype for level in pooled}


@every_network
@every_pooling
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_one_channel_pool_to_what_the_one_channel_network_gives(kind, way, copies):
    network, one = build(kind, way), scans(channels=1)
    x = torch.cat([one] * copies + [torch.zeros_like(one)] * (3 - copies), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), of_one_channel(network, kind, one), rtol=1e-4, atol=1e-5)


@every_network
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_one_channel_are_scaled_to_what_a_repeated_first_convolution_makes_of_one(kind, copies):
    network, plain, one = build(kind, "scaled"), build(kind, channels=1), scans(channels=1)
    weights = plain.state_dict()
    first = {name for name, value in network.state_dict().items() if value.shape != weights[name].shape}
    assert first
    network.load_state_dict({k: v.repeat_interleave(3, 1) / 3 if k in first else v for k, v in weights.items()})
    x = torch.cat([one] * copies + [torch.zeros_like(one)] * (3 - copies), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(one), rtol=1e-4, atol=1e-5)


@every_network
@every_way
@pytest.mark.parametrize("present", [(0,), (2,), (0, 1), (1, 2), ()])
def test_no_constant_of_an_absent_channel_is_seen(kind, way, present):
    """Whatever a placeholder holds and a normalisation makes of it: the network sees the same."""
    network, x = build(kind, way), scans()
    absent = [channel for channel in range(3) if channel not in present]
    outputs = []
    for constant in (0.0, -0.7, 12.5):
        x[:, absent] = constant
        with torch.no_grad():
            outputs.append(network(x))
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=0)


@every_way
def test_samples_of_a_batch_lack_channels_independently(way):
    network, x = build("swin", way), scans()
    x[0, 0], x[1, 1:] = 0, 3
    with torch.no_grad():
        together = network(x)
        for sample in range(2):
            torch.testing.assert_close(network(x[sample : sample + 1])[0], together[sample], rtol=1e-4, atol=1e-5)


@every_way
def test_with_all_channels_there_nothing_is_hidden_or_scaled(way):
    x = scans()
    hidden, counted = without_absent(x)
    assert counted.all() and torch.equal(hidden, x)
    torch.testing.assert_close(scaled_by_presence(x), x)


def test_background_that_all_channels_share_belongs_to_those_that_were_scanned():
    """A brain in a corner, whose background a z-score over the image put at -0.4; the third channel is missing."""
    x = torch.full((1, 3, 32, 32, 32), -0.4)
    x[:, :2, :16, :16, :16] = scans(2, (16, 16, 16))[:1]
    x[:, 2] = 1.5
    view = channels_in_view(x)
    assert view[:, :2].all() and not view[:, 2].any()
    hidden, _ = without_absent(x)
    assert torch.equal(hidden[:, :2], x[:, :2]) and not hidden[:, 2].any()


def test_outside_its_field_of_view_a_channel_is_absent():
    x = scans(2, (32, 16, 16))
    x[:, 1, :16] = -0.4
    hidden, counted = without_absent(x)
    assert counted[:, 0].all() and not counted[:, 1, :2].any() and counted[:, 1, 2:].all()
    assert not hidden[:, 1, :16].any() and torch.equal(hidden[:, 1, 16:], x[:, 1, 16:])
    torch.testing.assert_close(scaled_by_presence(x)[:, 0, :16], 2 * x[:, 0, :16])
    pooled = Pooled(torch.nn.AvgPool3d(4), [1])
    once = pooled(x)
    x[:, 1, :16] = 7
    assert torch.equal(pooled(x), once), "the value beyond its field of view counts nowhere"
    torch.testing.assert_close(once[:, :, :4], torch.nn.AvgPool3d(4)(x[:, :1, :16]))


def test_where_nothing_was_scanned_all_channels_count_and_none_is_seen():
    hidden, counted = without_absent(torch.full((1, 3, 16, 16, 16), 2.0))
    assert counted.all() and not hidden.any()


@given(
    size=st.tuples(*[st.integers(3, 35)] * 3),
    edges=st.lists(st.integers(0, 35), min_size=3, max_size=3),
    axes=st.sets(st.sampled_from([2, 3, 4])),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_what_counts_is_mirrored_with_the_patch(size, edges, axes, seed):
    """So that mirroring in prediction sees the same channels; whatever the size."""
    x = scans(3, size, seed)
    for channel, edge in enumerate(edges):
        x[:, channel, edge:] = channel
    mirrored, counted = without_absent(x.flip(tuple(axes)))
    expected, expected_counted = without_absent(x)
    assert torch.equal(mirrored.flip(tuple(axes)), expected)
    assert torch.equal(counted.flip(tuple(axes)), expected_counted)
    assert counted.any(1).all(), "there is a channel everywhere"
    assert counted.shape[2:] == tuple(-(-length // BLOCK) for length in size)


@every_network
@every_way
def test_the_encoder_learns_whichever_channels_there_are(kind, way):
    network, x = build(kind, way).train(), scans()
    x[:, 1:] = 0
    network(x).square().mean().backward()
    gradients = {
        name: one.grad
        for name, one in network.encoder.named_parameters()
        if "module" in name or way in ("zeros", "scaled")
    }
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert next(iter(gradients.values())).any(), "the first convolution's"


@every_way
def test_copies_and_compiled_networks_treat_channels_alike(way):
    """The mean of late weights is a copy, and nnU-Net compiles the network of a residual encoder whole."""
    network, x = build("resenc", way), scans()
    x[:, 1] = 4
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(copy.deepcopy(network)(x), expected)
        torch.testing.assert_close(torch.compile(network, backend="eager")(x), expected)
        assert not torch.allclose(network(scans()), expected)
