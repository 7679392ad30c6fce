"""Lesions that are to be found in another head."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import Examples, Pass
from nnunet_ssl.pretraining.objectives.lesions import LesionSearch, at_places, lesion_info_nce
from nnunet_ssl.pretraining.optimization import schedules
from nnunet_ssl.pretraining.passes import key_pass, query_passes
from nnunet_ssl.pretraining.views.augmentation import Batch


def examples_of(pairs=4, views=2, size=(64, 32, 32), step=0, first=0):
    shape = (views, pairs, 1, *size)
    scans = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    batch = Batch(
        views=scans,
        targets=scans.clone(),
        subject=torch.arange(pairs),
        session=torch.arange(pairs),
        scan_ids=[["scan"] * pairs] * views,
        step=step,
    )
    return Examples(batch=batch, unpaired=None, mask=None, first=first)


class Blind:
    """Encoders and heads that were made up: `see` maps views with lesions, and without, to a vector each."""

    def __init__(self, clean, see):
        self.clean, self.see = clean, see

    def encode(self, views, mask=None):
        vectors = torch.stack([self.see(place, one != self.clean[place]) for place, one in enumerate(views)])
        maps = vectors[:, :, None, None, None].expand(-1, -1, *(size // 8 for size in views.shape[2:]))
        return [None, None, maps]

    @staticmethod
    def head(name, features):
        return F.normalize(features, dim=-1)


def direction(seed):
    return torch.randn(256, generator=torch.Generator().manual_seed(int(seed)))


def loss_of(see, **sizes):
    config = load_config("mcl_path", ["lesions.temperature=0.05", "patch_size=64,32,32"])
    examples = examples_of(**sizes)
    query = Blind(examples.paired_views, see)
    maps = query.encode(examples.paired_views)
    given = Pass(maps=maps, examples=examples, taught=None, state=None, schedule={})
    return LesionSearch(config).branch(query, given).figures


def test_who_sees_the_lesion_alone_finds_it():
    figures = loss_of(lambda place, lesion: direction(lesion.sum()))
    assert figures["lesions/placed"] == figures["lesions/accuracy"] == 1
    assert figures["loss/lesions"] < 0.01


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_who_sees_the_head_alone_guesses(heads):
    """Whether all are one to it, the two views of a pair, or none."""
    figures = loss_of(lambda place, lesion: direction(place % heads))
    assert figures["lesions/accuracy"] == 0
    assert figures["loss/lesions"] == pytest.approx(math.log(2 * 4), rel=1e-5)
    assert figures["lesions/loss_over_guessing"] == pytest.approx(1, rel=1e-5)


def test_who_sees_that_there_is_a_lesion_and_not_which_knows_it_from_none_alone():
    figures = loss_of(lambda place, lesion: direction(lesion.any()))
    assert figures["loss/lesions"] == pytest.approx(math.log(2 * 4 - 1), abs=0.01)


def test_whose_features_of_a_lesion_are_of_the_head_as_well_does_not_find_it():
    figures = loss_of(lambda place, lesion: direction(lesion.sum() * (1 + place)))
    assert figures["lesions/loss_over_guessing"] > 1


def test_single_scans_serve_as_heads_too_and_an_odd_one_is_left_out():
    for scans, lesions in ((4, 2), (5, 2)):
        figures = loss_of(lambda place, lesion: direction(0), pairs=scans, views=1)
        assert figures["loss/lesions"] == pytest.approx(math.log(2 * lesions), rel=1e-5)


def test_the_loss_is_cross_entropy_over_the_stated_negatives():
    generator = torch.Generator().manual_seed(0)
    lesions = F.normalize(torch.randn(2, 5, 6, generator=generator), dim=-1)
    none = F.normalize(torch.randn(6, generator=generator), dim=-1)
    placed = torch.tensor([True, False, True, True, True])
    those = torch.nonzero(placed)[:, 0]
    terms = []
    for head in range(2):
        for lesion in those:
            others = [lesions[there, other] for there in range(2) for other in those if other != lesion]
            candidates = torch.stack([lesions[1 - head, lesion], *others, none])
            terms.append(-(candidates @ lesions[head, lesion] / 0.3).log_softmax(0)[0])
    result = lesion_info_nce(lesions, none, placed, 0.3)
    torch.testing.assert_close(result.loss, torch.stack(terms).mean())
    assert result.negatives == 2 * (4 - 1) + 1


def test_without_any_lesion_the_loss_is_zero_and_finite():
    features = F.normalize(torch.randn(2, 3, 6), dim=-1).requires_grad_()
    result = lesion_info_nce(features, features[0, 0].detach(), torch.zeros(3, dtype=torch.bool), 0.2)
    result.loss.backward()
    assert result.loss == 0 and features.grad.isfinite().all()


def test_features_are_those_at_the_lesion():
    maps = torch.randn(1, 3, 2, 2, 3)
    mask = torch.zeros(1, 1, 16, 16, 20, dtype=torch.bool)
    mask[0, 0, 4:10, 0:2, 17:19] = True  # four slices in one cell, two in the next; the last cell is cut
    expected = (4 * maps[0, :, 0, 0, 2] + 2 * maps[0, :, 1, 0, 2]) / 6
    torch.testing.assert_close(at_places(maps, mask, 8)[0], expected)
    assert not at_places(maps, torch.zeros_like(mask), 8).any()


def losses_of(learner, examples):
    taught = key_pass(learner, examples)
    passes = query_passes(learner, examples, taught, schedules(0, learner.config))
    return {name: branch for branches in passes for name, branch in branches.items()}


def test_nothing_else_of_the_recipe_sees_the_lesions(tiny):
    """Views, targets, keys and the other branches' losses are bit for bit those of the recipe without them."""
    losses = []
    for overrides in ([], ["lesions.weight=1"]):
        learner = Learner(load_config("mcl_mim", [*tiny, "batch_size=4", *overrides]))
        examples = examples_of()
        mask = torch.rand(8, 2, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5
        mask[:, 0] = ~mask[:, 1]
        examples = Examples(batch=examples.batch, unpaired=None, mask=mask)
        before = copy.deepcopy(examples)
        losses.append(losses_of(learner, examples))
        assert torch.equal(examples.batch.views, before.batch.views)
        assert torch.equal(examples.batch.targets, before.batch.targets)
    assert set(losses[1]) - set(losses[0]) == {"lesions"}
    for name in losses[0]:
        assert torch.equal(losses[0][name].loss, losses[1][name].loss)


def test_gradients_reach_the_encoder_as_far_as_the_map(tiny):
    learner = Learner(load_config("mcl_path", tiny))
    losses_of(learner, examples_of())["lesions"].loss.backward()
    encoder = learner.query.encoder
    assert all(one.grad is not None and one.grad.any() for one in learner.query.lesion_projection.parameters())
    assert encoder.patch_embed.proj.weight.grad.any()
    moved = [any(one.grad is not None and one.grad.any() for one in part.parameters()) for part in encoder.stages]
    assert moved == [True, True, False, False], "stages at strides 2 and 4 make the map of stride 8"


def test_the_loss_follows_from_seed_step_and_place(tiny):
    learner = Learner(load_config("mcl_path", tiny))
    one, again = (losses_of(learner, examples_of())["lesions"].loss for _ in range(2))
    assert torch.equal(one, again)
    elsewhere = losses_of(learner, examples_of(first=4))["lesions"].loss
    other_seed = Learner(load_config("mcl_path", [*tiny, "seed=1"]))
    other_seed.load_state_dict(learner.state_dict())
    assert elsewhere != one != losses_of(other_seed, examples_of())["lesions"].loss


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mcl_path", ["masked.target=voxels", "shared_pass=true"], r"cannot take part in shared_pass=true"),
        ("mcl_path", ["lesions.stride=3"], "lesions.stride is 3; the encoder has maps of stride 2, 4, 8, 16, 32"),
        ("mcl_path", ["batch_size=4", "accumulation=4"], "at least two examples .* raise batch_size, or lower accum"),
        ("mcl_path", ["batch_size=1"], "at least two examples"),
        ("mcl_path", ["lesions.diameter=[9, 3]"], r"lesions.diameter is \[9.0, 3.0\]; it is a range"),
        ("mcl_path", ["lesions.contrast=[0, 3]"], r"lesions.contrast\[0\] is 0.0; it must be positive"),
        ("mcl_path", ["lesions.opposite=2"], "lesions.opposite is 2.0; it must be between 0 and 1"),
        ("mcl_path", ["lesions=3"], "lesions is 3; it takes keys"),
        ("mcl_path", ["contrastive.pairs=none"], r"beyond it untrained: set lesions.stride=32, contrastive.pairs, or"),
        ("mcl", ["lesions.wieght=3"], "did you mean 'lesions.weight'"),
        (
            "mim",
            ["swin.depths=1,1", "swin.num_heads=1,2", "patch_size=96,96,6", "lesions.weight=1"],
            "too small for les",
        ),
    ],
)
def test_what_lesions_cannot_do_is_refused(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, overrides)


def test_a_part_with_one_pair_is_refused_where_processes_divide_the_batch(tiny):
    learner = Learner(load_config("mcl_path", tiny))
    with pytest.raises(UserError, match="every process needs at least two examples"):
        losses_of(learner, examples_of(pairs=1))


@pytest.mark.parametrize("backbone", ["swin", "resenc", "primus"])
def test_every_backbone_has_the_map(backbone):
    config = load_config("mcl_path", [f"backbone={backbone}"])
    assert [objective.name for objective in config.objectives] == ["contrastive", "lesions"]


def test_no_lesion_is_wider_than_half_of_the_patch():
    config = load_config("mcl_path", ["swin.depths=1,1", "swin.num_heads=1,2", "patch_size=16,24,16"])
    assert LesionSearch(config).ranges.diameter == (3, 8)
