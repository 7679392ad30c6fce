"""One optimizer step: against plain code, in parts, on two ranks."""

import copy

import pytest
import torch
import torch.multiprocessing as mp

from nnunet_ssl.pretraining import distributed
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.base import Examples
from nnunet_ssl.pretraining.objectives.contrastive import symmetric_info_nce
from nnunet_ssl.pretraining.objectives.masked import bottleneck_grid, draw_masks, reconstruction_error
from nnunet_ssl.pretraining.optimization import BranchAdamW, build_optimizer, schedules
from nnunet_ssl.pretraining.step import training_step
from nnunet_ssl.pretraining.views.augmentation import Batch

PATCH = (64, 32, 32)
TINY = [
    "swin.embed_dim=8",
    "swin.depths=1,1,1,1",
    "swin.num_heads=1,2,2,2",
    "swin.window_size=4",
    "patch_size=64,32,32",
    "contrastive.hidden=16",
    "contrastive.dim=8",
    "contrastive.weight={low: 1.0, high: 1.0}",
    "queue_size=24",
    "masked.tokens.prototypes=16",
    "masked.tokens.hidden=16",
    "masked.tokens.bottleneck=8",
    "masked.tokens.level=2",
]
BALANCES = {
    "clip": ["balance=clip", "branches={contrastive: 0.05, masked: 0.2}"],
    "equal_norms": ["balance=equal_norms", "branches.masked=2"],
    "learning_rates": ["balance=learning_rates", "branches.contrastive=0.3"],
}
IBOT = ["contrastive.pairs=mcl", "masked.target=tokens", "augmentation.shared_affine=true"]


def learner_of(recipe, *overrides):
    config = load_config(recipe, [*TINY, *overrides])
    learner = Learner(config)
    generator = torch.Generator().manual_seed(5)
    if config.needs_keys and config.pairs:
        keys = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator), dim=1)
        learner.queue.enqueue(keys, torch.arange(10) % 5, torch.arange(10))
    return learner


def examples_of(config, step, count=4, unpaired=2):
    """What one process would see at `step`: `count` pairs or scans, and `unpaired` further scans."""
    generator = torch.Generator().manual_seed(step)
    views = 2 if config.pairs else 1

    def batch(views, count):
        shape = (views, count, 1, *PATCH)
        return Batch(
            views=torch.randn(shape, generator=generator),
            targets=torch.randn(shape, generator=generator),
            subject=torch.arange(count) + step,
            session=torch.arange(count),
            scan_ids=[[f"scan_{view}_{one}" for one in range(count)] for view in range(views)],
            step=step,
        )

    combined = config.pairs and config.has_masked
    paired, single = batch(views, count), batch(1, unpaired) if combined else None
    number = views * count + (unpaired if combined else 0)
    mask = draw_masks(number, bottleneck_grid(PATCH, 32), (0.5, 0.75), generator) if config.has_masked else None
    return Examples(batch=paired, unpaired=single, mask=mask)


def share(examples, part, parts):
    """The part of the examples that one of several ranks sees."""

    def of(batch):
        count = batch.views.shape[1] // parts
        own = slice(part * count, (part + 1) * count)
        return Batch(
            views=batch.views[:, own],
            targets=batch.targets[:, own],
            subject=batch.subject[own],
            session=batch.session[own],
            scan_ids=[view[own] for view in batch.scan_ids],
            step=batch.step,
        )

    masks = []
    if examples.mask is not None:
        for mask, batch in zip(
            examples.mask.split([b.views.shape[:2].numel() for b in examples.batches]), examples.batches
        ):
            views, count = batch.views.shape[:2]
            own = slice(part * count // parts, (part + 1) * count // parts)
            masks.append(mask.unflatten(0, (views, count))[:, own].flatten(0, 1))
    return Examples(
        batch=of(examples.batch),
        unpaired=None if examples.unpaired is None else of(examples.unpaired),
        mask=torch.cat(masks) if masks else None,
    )


def run(learner, streams, steps=2, measured=False):
    """Take steps on the examples of `streams(step)`; return the figures of each.

    Plain gradient descent: Adam turns the rounding of a gradient near zero into a step of full size, unless its epsilon
    is large.
    """
    if learner.config.balance == "learning_rates":
        groups, shared = [{"params": list(learner.query.parameters())}], list(learner.query.encoder.parameters())
        optimizer = BranchAdamW(groups, shared, learner.config.branch_numbers, lr=0.1, eps=0.1)
    else:
        optimizer = torch.optim.SGD(learner.query.parameters(), lr=0.02)
    figures = []
    for step in range(steps):
        schedule = schedules(step, learner.config)
        update = training_step(learner, optimizer, iter(streams(step)), schedule, measured=measured)
        assert update.finite
        figures.append({name: float(value) for part in update.figures for name, value in part.items()})
    return figures


def assert_same(one, other, **tolerance):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(
            other.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def test_a_step_is_the_plain_computation():
    """mcl_mim written out: two passes, weighted sum, clip, update, moving average, queue."""
    learner = learner_of("mcl_mim", "contrastive.weight={low: 0.3, high: 0.3}", "gradient_clip=0.5")
    config, plain = learner.config, copy.deepcopy(learner)
    run(learner, lambda step: [examples_of(config, step)], steps=1)

    examples, query, key = examples_of(config, 0), plain.query, plain.key
    views = torch.cat([examples.batch.views[0], examples.batch.views[1], examples.unpaired.views[0]])
    targets = torch.cat([examples.batch.targets[0], examples.batch.targets[1], examples.unpaired.targets[0]])
    with torch.no_grad():
        keys = torch.stack([key.projection(key.encoder(view)[-1]) for view in examples.batch.views])
    queries = torch.stack([query.projection(query.encoder(view)[-1]) for view in examples.batch.views])
    queue = plain.queue
    contrastive = symmetric_info_nce(queries, keys, examples.batch.subject, queue.keys, queue.subjects, 0.2).loss
    maps = query.encoder(views, examples.mask)
    masked = reconstruction_error(query.decoder(maps, PATCH), targets, examples.mask, 32).mean()
    (0.3 * contrastive + masked).backward()
    torch.nn.utils.clip_grad_norm_(query.parameters(), 0.5)
    torch.optim.SGD(query.parameters(), lr=0.02).step()
    averaged = dict(key.named_parameters())
    with torch.no_grad():
        for name, parameter in query.named_parameters():
            if name in averaged:
                averaged[name].mul_(0.996).add_(parameter, alpha=0.004)
    queue.enqueue(torch.cat([keys[0], keys[1]]), examples.batch.subject.repeat(2), examples.batch.session.repeat(2))
    assert_same(plain, learner, rtol=1e-4, atol=1e-5)


def test_a_contrastive_branch_by_itself_is_not_weighed():
    shipped = learner_of("mcl")
    own = learner_of("mcl_mim", "masked.target=none", "contrastive.weight={low: 0.1, high: 0.1}")
    for learner in (shipped, own):
        run(learner, lambda step: [examples_of(shipped.config, step)], steps=1)
    assert_same(shipped, own, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["mcl_mim", "mcl_mim_balanced", "cl", "mim", *BALANCES])
def test_a_step_in_parts_equals_the_step_at_once(recipe):
    recipe, overrides = ("mcl_mim", BALANCES[recipe]) if recipe in BALANCES else (recipe, [])
    whole, parted = learner_of(recipe, *overrides), learner_of(recipe, "accumulation=2", *overrides)
    count = 2 if overrides else 4
    run(whole, lambda step: [examples_of(whole.config, step, count)])
    run(parted, lambda step: [share(examples_of(whole.config, step, count), part, 2) for part in range(2)])
    parameters = dict(parted.query.named_parameters())
    for name, parameter in whole.query.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-3, atol=1e-4)
    if whole.config.pairs:
        torch.testing.assert_close(parted.queue.state_dict(), whole.queue.state_dict(), rtol=1e-3, atol=1e-4)


def test_measuring_the_gradients_changes_nothing():
    plain, measured = learner_of("mcl_mim"), learner_of("mcl_mim")
    run(plain, lambda step: [examples_of(plain.config, step)])
    figures = run(measured, lambda step: [examples_of(plain.config, step)], measured=True)
    assert_same(plain, measured, rtol=0, atol=0)
    assert {"gradient/contrastive", "gradient/masked", "gradient/cosine", "gradient/total"} <= set(figures[0])


def test_measured_gradients_are_those_of_each_weighted_loss_alone():
    def measured(*overrides):
        learner = learner_of("mcl_mim", *overrides)
        return run(learner, lambda step: [examples_of(learner.config, step)], steps=1, measured=True)[0]

    both = measured()
    contrastive, masked = measured("masked.weight=0"), measured("contrastive.weight={low: 0, high: 0}")
    assert both["gradient/contrastive"] == pytest.approx(contrastive["gradient/contrastive"], rel=1e-4)
    assert both["gradient/masked"] == pytest.approx(masked["gradient/masked"], rel=1e-4)


def test_the_balanced_recipe_keeps_the_contrastive_gradient_below_the_masked_one():
    learner = learner_of(
        "mcl_mim_balanced", "contrastive.max_gradient_ratio=0.5", "contrastive.weight={low: 50, high: 50}"
    )
    figures = run(learner, lambda step: [examples_of(learner.config, step)])
    for one in figures:
        assert one["gradient/contrastive"] > one["gradient/masked"]
        assert one["gradient/balance"] == pytest.approx(0.5 * one["gradient/masked"] / one["gradient/contrastive"])


def encoder_gradients(weights):
    """What the first step's losses, weighted, send into the encoder, by plain code."""
    weighted = [f"contrastive.weight={{low: {weights[0]}, high: {weights[0]}}}", f"masked.weight={weights[1]}"]
    twin = learner_of("mcl_mim", *weighted, "gradient_clip=1e9")
    run(twin, lambda step: [examples_of(twin.config, step)], steps=1)
    return [parameter.grad.flatten() for parameter in twin.query.encoder.parameters()]


def test_clipping_by_branch_is_a_weight_of_each_loss():
    learner = learner_of("mcl_mim", *BALANCES["clip"], "gradient_clip=1e9")
    (figures,) = run(learner, lambda step: [examples_of(learner.config, step)], steps=1)
    factors = [figures[f"gradient/balance/{branch}"] for branch in ("contrastive", "masked")]
    assert max(factors) < 1
    assert figures["gradient/contrastive"] * factors[0] <= 0.05
    expected = torch.cat(encoder_gradients(factors))
    torch.testing.assert_close(
        torch.cat([one.grad.flatten() for one in learner.query.encoder.parameters()]), expected, rtol=1e-3, atol=1e-5
    )


def test_equal_norms_are_in_the_proportion_of_their_shares_and_remembered():
    learner = learner_of("mcl_mim", *BALANCES["equal_norms"], "contrastive.weight={low: 50, high: 50}")
    first, second = run(learner, lambda step: [examples_of(learner.config, step)])
    sent = [first[f"gradient/{one}"] * first[f"gradient/balance/{one}"] for one in ("contrastive", "masked")]
    assert sent[1] == pytest.approx(2 * sent[0], rel=1e-4)
    for place, objective in enumerate(learner.config.objectives):
        norms = [one[f"gradient/{objective.name}"] for one in (first, second)]
        expected = 0.9 * norms[0] + 0.1 * norms[1]
        assert float(learner.state_dict()["branch_norms"][place]) == pytest.approx(expected, rel=1e-4)


def test_norms_by_depth_are_measured_when_the_others_are():
    learner = learner_of("mcl_mim", *BALANCES["clip"])
    plain, measured = (
        run(learner, lambda step: [examples_of(learner.config, step)], steps=1, measured=measured)[0]
        for measured in (False, True)
    )
    assert not any(name.startswith("gradient/depth/") for name in plain)
    for branch in ("contrastive", "masked"):
        depths = [value for name, value in measured.items() if name.startswith("gradient/depth/") and branch in name]
        assert len(depths) == 5
        assert sum(value**2 for value in depths) == pytest.approx(measured[f"gradient/{branch}"] ** 2, rel=1e-4)


def test_the_shared_pass_learns_both_from_one_masked_look():
    learner = learner_of("mcl_mim", "shared_pass=true")
    before = copy.deepcopy(learner.state_dict())
    looks = []
    learner.query.encoder.register_forward_hook(lambda *_: looks.append(1))
    figures = run(learner, lambda step: [examples_of(learner.config, step)], steps=1, measured=True)
    assert len(looks) == 1
    assert figures[0]["gradient/contrastive"] > 0
    assert figures[0]["gradient/masked"] > 0
    assert not torch.equal(learner.state_dict()["queue.keys"], before["queue.keys"])


def test_tokens_of_the_other_view_are_the_target():
    learner = learner_of("mcl", *IBOT, "masked.tokens.centre_momentum=0.5")
    examples = examples_of(learner.config, 0)
    figures = run(learner, lambda step: [examples], steps=1)
    assert figures[0]["loss/masked"] > 0
    assert learner.centre.mean.abs().sum() > 0
    assert not hasattr(learner.key, "decoder") and not hasattr(learner.query, "decoder")


@pytest.mark.parametrize("asked", [False, True])
def test_a_step_tells_whether_a_process_was_asked_to_stop(asked):
    learner = learner_of("mim")
    optimizer = build_optimizer(learner.query, learner.config)
    given = (learner, optimizer, iter([examples_of(learner.config, 0)]), schedules(0, learner.config))
    update = training_step(*given, measured=False, stop_requested=lambda: asked)
    assert (update.finite, update.stopping) == (True, asked)


@pytest.mark.parametrize("balance", ["sum", *BALANCES])
def test_a_step_that_is_not_finite_changes_nothing(balance):
    learner = learner_of("mcl_mim", *BALANCES.get(balance, []))
    before = copy.deepcopy(learner.state_dict())
    optimizer = build_optimizer(learner.query, learner.config)
    examples = examples_of(learner.config, 0)
    examples.batch.views[0, 0, 0, 0, 0, 0] = float("nan")
    update = training_step(learner, optimizer, iter([examples]), schedules(0, learner.config), measured=False)
    assert not update.finite
    assert "scan_0_0" in update.scans
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not optimizer.state


BALANCED = {f"mcl_mim {balance}": overrides for balance, overrides in BALANCES.items()}
COMBINATIONS = {"mcl_mim": [], "mcl_mim_balanced": [], "cl": [], "mcl": IBOT, "mim": []} | BALANCED


def one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for recipe, overrides in COMBINATIONS.items():
        learner = learner_of(recipe.split()[0], *overrides)
        config = learner.config
        count = 2 if recipe in BALANCED else 4
        figures = run(learner, lambda step: [share(examples_of(config, step, count), rank, 2)], measured=True)  # noqa: B023
        torch.save({"learner": learner.state_dict(), "figures": figures}, folder / f"{recipe}_{rank}.pt")
    assert distributed.any_rank(rank == 1, torch.tensor(False), device=torch.device("cpu")) == [True, False]
    assert distributed.same_everywhere(2**62, 7, device=torch.device("cpu"))
    assert not distributed.same_everywhere(2**62, rank, device=torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    mp.spawn(one_of_two, (distributed._free_port(), tmp_path), nprocs=2)
    for recipe, overrides in COMBINATIONS.items():
        first, second = [torch.load(tmp_path / f"{recipe}_{rank}.pt") for rank in range(2)]
        for name, tensor in first["learner"].items():
            assert torch.equal(tensor, second["learner"][name]), f"{recipe}: {name} differs between the ranks"

        alone = learner_of(recipe.split()[0], *overrides)
        count = 2 if recipe in BALANCED else 4
        figures = run(alone, lambda step: [examples_of(alone.config, step, count)], measured=True)  # noqa: B023
        for mine, one, other in zip(figures, first["figures"], second["figures"]):
            for name in mine.keys() & {"loss/contrastive", "loss/masked", "contrastive/accuracy"}:
                assert (one[name] + other[name]) / 2 == pytest.approx(mine[name], rel=1e-4), (recipe, name)
            for name in (name for name in mine if name.startswith("gradient/")):
                assert one[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), (recipe, name)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(
                first["learner"][name],
                tensor,
                rtol=1e-3,
                atol=1e-5,
                msg=lambda text: f"{recipe} {name}: {text}",  # noqa: B023
            )
