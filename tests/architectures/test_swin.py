"""SwinEncoder against MONAI's SwinTransformer, and what MONAI's does not promise."""

import foreign
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nnunet_ssl.architectures.swin import SwinEncoder
from nnunet_ssl.errors import UserError
from nnunet_ssl.weights.monai_names import from_monai

SMALL = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
TINY = {"embed_dim": 6, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 3, 4)}


def small_encoder(**changes) -> SwinEncoder:
    torch.manual_seed(0)
    encoder = SwinEncoder(**{**SMALL, **changes})
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1, 0.1)
    return encoder


def gradients(encoder, x, weights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return d/dx and d/dparameters of a sum of all maps, weighted at random."""
    x = x.clone().requires_grad_()
    sum((level * weight).sum() for level, weight in zip(encoder(x), weights, strict=True)).backward()
    return x.grad, {name: parameter.grad for name, parameter in encoder.named_parameters()}


def assert_equal_monai(ours, theirs, x):
    """All maps and all gradients agree to 1e-10 in float64."""
    references = theirs(x)
    for own, reference in zip(ours(x), references, strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-10)
    weights = [torch.randn_like(level) for level in references]
    (own_x, own), (reference_x, reference) = (gradients(encoder, x, weights) for encoder in (ours, theirs))
    torch.testing.assert_close(own_x, reference_x, rtol=1e-10, atol=1e-10)
    for name, gradient in reference.items():
        torch.testing.assert_close(own[from_monai(name)], gradient, rtol=1e-10, atol=1e-10, msg=name)


# Sizes in voxels from one token to several windows: below, at and above the window on each axis, odd and even.
SIZES = st.tuples(*[st.integers(2, 40)] * 3).filter(lambda size: max(size) > 32)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=SIZES, window=st.integers(2, 7), batch=st.integers(1, 3), channels=st.integers(1, 2), use_v2=st.booleans())
@example(size=(64, 32, 32), window=4, batch=2, channels=1, use_v2=True)  # every grid divides by the window
@example(size=(33, 47, 29), window=4, batch=2, channels=1, use_v2=True)  # neither windows nor patches fit
@example(size=(34, 6, 18), window=7, batch=1, channels=1, use_v2=False)  # thinner than a window
def test_maps_and_gradients_equal_monai(size, window, batch, channels, use_v2):
    ours, theirs = foreign.twin_encoders(**TINY, window_size=window, in_channels=channels, use_v2=use_v2)
    assert_equal_monai(ours, theirs, torch.randn(batch, channels, *size, dtype=torch.float64))


@pytest.mark.slow
def test_the_papers_encoder_equals_monai():
    sizes = {"embed_dim": 48, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7}
    ours, theirs = foreign.twin_encoders(**sizes)
    assert_equal_monai(ours, theirs, torch.randn(1, 1, 64, 48, 36, dtype=torch.float64))


def test_parameter_counts_are_those_of_the_paper():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(SwinEncoder(conv_norm="instance", mask_token=False)) == 20_522_274
    assert count(SwinEncoder()) == 20_525_202


def test_attributes_describe_the_maps():
    encoder = small_encoder(patch_size=3)
    maps = encoder(torch.randn(1, 1, 50, 25, 31))
    assert [level.shape[1] for level in maps] == list(encoder.channels)
    for level, stride in zip(maps, encoder.strides, strict=True):
        assert level.shape[2:] == tuple(-(-size // stride) for size in (50, 25, 31))


def test_checkpointing_changes_nothing():
    x = torch.randn(1, 1, 40, 33, 36, dtype=torch.float64)
    plain, saving = small_encoder().double(), small_encoder(checkpointing=True).double()
    weights = [torch.randn_like(level) for level in plain(x)]
    (plain_x, plain_all), (saving_x, saving_all) = (gradients(encoder, x, weights) for encoder in (plain, saving))
    assert torch.equal(plain_x, saving_x)
    assert all(torch.equal(plain_all[name], saving_all[name]) for name in plain_all if plain_all[name] is not None)


def test_a_plan_made_in_inference_serves_training():
    encoder, x = small_encoder(), torch.randn(1, 1, 38, 38, 38)
    with torch.inference_mode():
        encoder(x)
    sum(level.sum() for level in encoder(x)).backward()
    assert encoder.patch_embed.proj.weight.grad is not None


def test_each_sample_is_encoded_alone():
    encoder, x = small_encoder().double(), torch.randn(3, 1, 40, 33, 36, dtype=torch.float64)
    with torch.no_grad():
        for together, alone in zip(encoder(x), encoder(x[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)


def test_bf16_autocast_stays_close_and_trains():
    encoder, x = small_encoder(), torch.randn(1, 1, 40, 40, 40)
    with torch.no_grad():
        exact = encoder(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = encoder(x)
    for level, reference in zip(maps, exact, strict=True):
        error = (level.float() - reference).square().mean().sqrt()
        assert error < 0.05  # the maps have unit variance; bfloat16 resolves 1/256
    sum(level.float().square().mean() for level in maps).backward()
    for name, parameter in encoder.named_parameters():
        if name != "mask_token":
            assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32


# ---- mask ------------------------------------------------------------------------------------------------------------


def tokens_before_the_stages(encoder, x, mask):
    """Return what enters the first stage, with and without the mask."""
    seen = []
    handle = encoder.stages[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        encoder(x, mask)
        encoder(x)
    handle.remove()
    return seen


def test_masked_tokens_become_the_token_and_no_other_changes():
    encoder, x = small_encoder(), torch.randn(2, 1, 64, 40, 33)
    mask = torch.rand(2, 2, 2, 2) < 0.5
    masked, plain = tokens_before_the_stages(encoder, x, mask)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in plain.shape[:4]]).tolist():
        sample, *place = index
        hidden = mask[(sample, *(coordinate // 16 for coordinate in place))]
        assert torch.equal(masked[tuple(index)], encoder.mask_token if hidden else plain[tuple(index)])


def test_masking_nothing_changes_nothing():
    encoder, x = small_encoder(), torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        for masked, plain in zip(encoder(x, torch.zeros(1, 2, 1, 1, dtype=torch.bool)), encoder(x), strict=True):
            assert torch.equal(masked, plain)


def test_what_is_hidden_cannot_be_seen():
    encoder, x = small_encoder(), torch.randn(1, 1, 64, 32, 32)
    other, mask = x.clone(), torch.tensor([True, False]).reshape(1, 2, 1, 1)
    other[:, :, :32] = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for first, second in zip(encoder(x, mask), encoder(other, mask), strict=True):
            assert torch.equal(first, second)


def test_mask_token_learns_only_from_masked_passes():
    encoder, x = small_encoder(), torch.randn(1, 1, 64, 32, 32)
    encoder(x)[-1].square().sum().backward()
    assert encoder.mask_token.grad is None
    encoder(x, torch.tensor([True, False]).reshape(1, 2, 1, 1))[-2].square().sum().backward()
    assert encoder.mask_token.grad.abs().max() > 0


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"it is \(1, 2, 1, 1\)"):
        small_encoder()(torch.randn(1, 1, 64, 32, 32), torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask_token=False"):
        encoder = small_encoder(mask_token=False)
        encoder(torch.randn(1, 1, 64, 32, 32), torch.zeros(1, 2, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": (1, 2)}, "4 depths .* but 2 num_heads"),
        ({"num_heads": (5, 2, 4, 8)}, "12 channels cannot have 5 heads"),
        ({"conv_norm": "batch"}, "'group' or 'instance'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        small_encoder(**changes)
