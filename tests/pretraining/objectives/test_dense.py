"""Places of one view that are to be found in the other one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import Examples
from nnunet_ssl.pretraining.objectives.dense import Dense, dense_info_nce
from nnunet_ssl.pretraining.objectives.lesions import LesionSearch
from nnunet_ssl.pretraining.optimization import schedules
from nnunet_ssl.pretraining.passes import key_pass, query_passes
from nnunet_ssl.pretraining.views.augmentation import Batch
from nnunet_ssl.pretraining.views.streams import Stream

GRID = (8, 4, 4)


def examples_of(views, subject=None, first=0, step=0):
    """Pairs whose scans are `views` (2, B, 1, 64, 32, 32)."""
    pairs = views.shape[1]
    batch = Batch(
        views=views,
        targets=views.clone(),
        subject=torch.arange(pairs) if subject is None else subject,
        session=torch.arange(pairs),
        scan_ids=[["scan"] * pairs] * 2,
        step=step,
    )
    return Examples(batch=batch, unpaired=None, mask=None, first=first)


def noise(pairs=3, seed=0):
    return torch.randn(2, pairs, 1, 64, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def learner(tiny):
    return Learner(load_config("mcl_dense", [*tiny, "dense.cells=20"]))


def branch_of(learner, examples):
    (branches,) = query_passes(learner, examples, key_pass(learner, examples), schedules(0, learner.config))
    return branches["dense"]


@pytest.mark.parametrize("kind", [Dense, LesionSearch])
def test_an_encoder_whose_maps_do_not_halve_the_grid_is_refused(tiny, kind):
    objective = kind(load_config("mcl_dense", [*tiny, "lesions.weight=1"]))
    uneven = SimpleNamespace(channels=(4, 4, 4, 4, 8), strides=(1, 2, 4, 16, 32))
    with pytest.raises(ValueError, match=r"stride is 8, .* are \(1, 2, 4, 16, 32\)"):
        objective.build_head(uneven)
    even = SimpleNamespace(channels=(4, 4, 6, 4, 8), strides=(2, 4, 8, 16, 32))
    assert objective.build_head(even).layers[0].in_features == 6


def test_the_loss_is_cross_entropy_over_distant_cells_and_other_subjects():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (F.normalize(torch.randn(2, 3, 4, 6, generator=generator), dim=-1) for _ in range(2))
    position = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 3, 1], [5, 0, 0]]).repeat(3, 1, 1)
    counted = torch.ones(3, 4, dtype=torch.bool)
    counted[1, 2] = False
    subject = torch.tensor([7, 8, 7])
    terms = []
    for view in range(2):
        for pair in range(3):
            for cell in range(4):
                candidates = [keys[1 - view, pair, cell]]
                for there in range(3):
                    for other in range(4):
                        distance = (position[pair, cell] - position[there, other]).abs().max()
                        far = distance >= 2 if there == pair else subject[there] != subject[pair]
                        if far and counted[there, other]:
                            candidates.append(keys[1 - view, there, other])
                if counted[pair, cell]:
                    terms.append(-(torch.stack(candidates) @ queries[view, pair, cell] / 0.3).log_softmax(0)[0])
    result = dense_info_nce(queries, keys, position, counted, subject, apart=2, temperature=0.3)
    torch.testing.assert_close(result.loss, torch.stack(terms).mean())


def test_one_map_for_both_views_makes_corresponding_voxels_the_same_place(write_prepared, tiny):
    write_prepared(modalities=("t1", "t2"))  # t2 is minus t1
    targets = {}
    for recipe in ("mcl", "mcl_dense"):
        config = load_config(recipe, tiny)
        examples = next(Stream(open_corpus(500), config, device=torch.device("cpu"), start=0, workers=0))
        targets[recipe] = examples.batch.targets
    torch.testing.assert_close(targets["mcl_dense"][0], -targets["mcl_dense"][1])
    assert (targets["mcl"][0] + targets["mcl"][1]).abs().max() > 0.1


def test_places_of_identical_views_are_found_and_permuted_ones_are_not(learner):
    """With the key network as it begins, the key of a cell is its query."""
    views = noise()[:1].repeat(2, 1, 1, 1, 1, 1)
    aligned = branch_of(learner, examples_of(views))
    assert aligned.figures["dense/accuracy"] == 1

    learner.key.encoder.register_forward_hook(lambda _, __, maps: [one.flip(2) for one in maps])
    permuted = branch_of(learner, examples_of(views))
    assert permuted.figures["dense/accuracy"] < 0.5
    assert permuted.loss > aligned.loss


def test_a_positive_of_identical_views_is_the_query_itself(learner):
    examples = examples_of(noise()[:1].repeat(2, 1, 1, 1, 1, 1))
    taught = key_pass(learner, examples)["dense"]
    assert torch.equal(taught.keys[0], taught.keys[1])
    maps = learner.query.encode(examples.paired_views)
    queries = Dense(learner.config)._project(learner.query, maps, taught.cells, examples)
    torch.testing.assert_close((queries * taught.keys.flip(0)).sum(dim=-1), torch.ones(2, 3, 20))


def test_cells_of_the_background_have_no_part(learner):
    views = noise()
    views[0, 0, :, :40] = 0  # brain in the last three of eight slices of cells
    views[1, 1, :, 12:] = 0  # in one and a half
    views[:, 2] = 0
    cells, counted = Dense(learner.config).draw_cells(examples_of(views))
    slices = torch.unravel_index(cells, GRID)[0]
    assert counted.sum(dim=1).tolist() == [20, 20, 0]
    assert slices[0].min() >= 5 and slices[1].max() <= 1
    assert (cells[:2].sort().values.diff() > 0).all(), "no cell is drawn twice"
    assert branch_of(learner, examples_of(views)).loss.isfinite()


def test_fewer_cells_than_asked_for_are_taken_where_there_are_no_more(learner):
    views = noise()
    views[:, 0, :, 8:] = 0
    cells, counted = Dense(learner.config).draw_cells(examples_of(views))
    assert counted[0].sum() == 16 and set(cells[0][counted[0]].tolist()) == set(range(16))


def test_cells_follow_from_seed_step_and_place(learner):
    objective = Dense(learner.config)
    whole, _ = objective.draw_cells(examples_of(noise(4)))
    half, _ = objective.draw_cells(examples_of(noise(2), first=2))
    assert torch.equal(whole[2:], half)
    assert not torch.equal(whole, objective.draw_cells(examples_of(noise(4), step=1))[0])


def test_pairs_of_one_subject_are_no_negatives_of_each_other(learner):
    views = noise(2)
    apart, together = (
        branch_of(learner, examples_of(views, torch.tensor(subject))).figures["dense/negatives"]
        for subject in ([0, 1], [0, 0])
    )
    assert apart == together + 20


def test_gradients_reach_the_encoder_and_not_the_key_network(learner):
    branch_of(learner, examples_of(noise())).loss.backward()
    assert all(one.grad is not None and one.grad.any() for one in learner.query.dense_projection.parameters())
    assert learner.query.encoder.patch_embed.proj.weight.grad.any()
    assert all(one.grad is None for one in learner.key.parameters())


def test_a_shared_pass_serves_the_dense_branch_too(tiny):
    """Its queries come from views with hidden cells, paired views first; its keys from whole ones."""
    learner = Learner(load_config("mcl_dense", [*tiny, "masked.target=voxels", "shared_pass=true"]))
    examples = examples_of(noise(2))
    mask = torch.tensor([True, False]).view(1, 2, 1, 1).repeat(6, 1, 1, 1)
    unpaired = copy.copy(examples.batch)
    unpaired.views = unpaired.targets = noise(2, seed=1)[:1]
    examples = Examples(batch=examples.batch, unpaired=unpaired, mask=mask)
    (branches,) = query_passes(learner, examples, key_pass(learner, examples), schedules(0, learner.config))
    assert set(branches) == {"contrastive", "masked", "dense"}
    assert all(branch.loss.isfinite() and branch.loss > 0 for name, branch in branches.items() if name != "contrastive")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mcl_dense", ["augmentation.shared_affine=false"], "voxel by voxel: set augmentation.shared_affine=true"),
        ("mcl_dense", ["sampling.jitter_mm=2"], "voxel by voxel: set sampling.jitter_mm=0"),
        ("mim", ["dense.weight=1"], r"dense compares two views: set contrastive\.pairs=mcl"),
        ("mcl_dense", ["dense.stride=64"], "dense.stride is 64; the encoder has maps of stride 2, 4, 8, 16, 32"),
        ("mcl_dense", ["backbone=primus", "dense.stride=4"], "dense.stride is 4; the encoder has maps of stride 8"),
        ("mcl_dense", ["dense.cells=0"], "dense.cells is 0; it must be at least 1"),
        ("mcl_dense", ["dense.temperature=0"], "dense.temperature is 0.0; it must be positive"),
    ],
)
def test_what_the_dense_branch_cannot_do_is_refused(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, overrides)


@pytest.mark.parametrize("backbone", ["swin", "resenc", "primus"])
def test_every_backbone_has_the_map(backbone):
    config = load_config("mcl_dense", [f"backbone={backbone}"])
    assert [objective.name for objective in config.objectives] == ["contrastive", "dense"]
