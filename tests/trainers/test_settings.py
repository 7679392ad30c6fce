"""Settings: what may be written, what is refused, and that two of them never share a name."""

import dataclasses
import json
from typing import get_args, get_type_hints

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunet_ssl.architectures.swin import MERGINGS, Merging
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.plans import plans_with_settings
from nnunet_ssl.trainers.recipes import OPTIMIZERS, RECIPES, SCHEDULES
from nnunet_ssl.trainers.settings import Settings

CHOICES = {key: get_args(hint) for key, hint in get_type_hints(Settings).items()}
rates = st.floats(1e-9, 0.5)
FREEZE_SHARES = {"paper": st.floats(0, 0.99), "warmup": st.just(0.0), "sawtooth": st.floats(0.01, 0.5)}


@st.composite
def settings_of_all_kinds(draw):
    schedule = draw(st.sampled_from([*FREEZE_SHARES]))
    freeze_share, warmup_share = draw(FREEZE_SHARES[schedule]), draw(st.floats(0, 0.4))
    left = max(0.0, 1 - freeze_share - warmup_share)
    choices = {
        key: draw(st.sampled_from(CHOICES[key]))
        for key in ("recipe", "decay", "optimizer", "loss", "augmentation", "decoder")
    }
    channels, each = draw(st.sampled_from(CHOICES["channels"])), st.lists(st.floats(0, 0.99), min_size=1, max_size=4)
    return Settings(
        **choices,
        channels=channels,
        channel_drop=(0.5,) if channels == "all" else draw(each.map(tuple)),
        schedule=schedule,
        freeze_share=freeze_share,
        warmup_share=warmup_share,
        average_share=draw(st.just(0.0) | st.floats(0, 0.99 * left)),
        steps=draw(st.integers(1, 40).map(lambda epochs: 250 * epochs)),
        lr=draw(rates),
        encoder_lr=draw(st.none() | rates),
        deep_supervision=draw(st.sampled_from([None, True, False])),
        patch_size=draw(st.none() | st.tuples(*[st.integers(1, 320)] * 3)),
        batch_size=draw(st.none() | st.integers(1, 64)),
        fraction=draw(st.integers(1, 100)),
        merging=draw(st.none() | st.sampled_from(sorted(MERGINGS))),
        seed=draw(st.integers(0, 10**6)),
        name=draw(st.text("abcXYZ019", max_size=5) | st.sampled_from(["seed1", "lr", "steps500", "long"])),
    )


all_settings = settings_of_all_kinds()


def as_text(given_settings):
    """Write settings as a user would, the defaults that are None left out."""
    values = {key: value for key, value in dataclasses.asdict(given_settings).items() if value is not None}
    written = {key: "x".join(map(str, one)) if isinstance(one, tuple) else one for key, one in values.items()}
    return ", ".join(f"{key} = {value}" for key, value in written.items())


@settings(deadline=None)
@given(all_settings)
def test_settings_are_read_as_they_are_written(chosen):
    assert Settings().updated(as_text(chosen)) == chosen


@settings(deadline=None)
@given(all_settings)
def test_settings_survive_the_plans_file(chosen):
    plans = {"plans_name": "nnUNetPlans", "configurations": {}}
    assert Settings.of_plans(json.loads(json.dumps(plans_with_settings(plans, chosen)))) == chosen


@settings(deadline=None)
@given(all_settings, all_settings)
def test_different_settings_have_different_names_that_nnunet_can_split(one, other):
    assume(one != other)
    assert one.suffix() != other.suffix()
    assert "__" not in one.suffix() and "/" not in one.suffix()


def test_text_is_text_and_a_number_is_decimal():
    """YAML would read the name as a number, and the seed as octal."""
    assert Settings().updated("name=007,seed=0100,steps=1_000") == Settings(name="007", seed=100, steps=1000)


def test_every_word_has_its_table():
    for key, table in (("recipe", RECIPES), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
        assert CHOICES[key] == tuple(table)
    assert get_args(Merging) == tuple(MERGINGS)


@pytest.mark.parametrize("written", [{"recipe": "best"}, {"lr": "fast"}, {"momentum": 0.9}])
def test_plans_with_settings_of_another_kind_are_refused(written):
    with pytest.raises(UserError, match=next(iter(written))):
        Settings.of_plans({"nnunet_ssl": {"settings": written}})


def test_defaults_add_nothing_to_the_name():
    assert Settings().suffix() == "" == Settings().updated("steps=5000, fraction=100").suffix()
    assert Settings().updated("steps=500,patch_size=64x96x64").suffix() == "_steps500_patch64x96x64"


def test_later_settings_take_the_place_of_earlier_ones_and_keep_the_rest():
    assert Settings(steps=500).updated("lr=0.001") == Settings(steps=500, lr=0.001)


def test_the_defaults_are_the_papers_recipe():
    assert dataclasses.asdict(Settings()) | RECIPES["paper"] == dataclasses.asdict(Settings())


def test_recipes_name_the_same_settings_so_that_one_takes_the_place_of_another():
    for recipe in RECIPES.values():
        assert recipe.keys() == RECIPES["paper"].keys()
        assert recipe | SCHEDULES[recipe["schedule"]] == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_its_settings_and_single_ones_override_it_wherever_they_stand(recipe):
    whole = Settings().updated(f"recipe={recipe}")
    assert {key: getattr(whole, key) for key in RECIPES[recipe]} == RECIPES[recipe]
    one = dataclasses.replace(whole, steps=500, lr=0.02)
    assert Settings().updated(f"recipe={recipe},steps=500,lr=0.02") == one
    assert Settings().updated(f"steps=500, lr=0.02, recipe={recipe}") == one
    assert whole.updated("steps=500").updated("lr=0.02") == one


@settings(deadline=None)
@given(all_settings, st.sampled_from([*RECIPES]))
def test_naming_a_recipe_again_changes_nothing_and_another_replaces_what_recipes_set(chosen, recipe):
    brought = {} if recipe == chosen.recipe else RECIPES[recipe] | {"recipe": recipe}
    assert dataclasses.asdict(chosen.updated(f"recipe={recipe}")) == dataclasses.asdict(chosen) | brought


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_schedule_brings_its_numbers_into_every_recipe(recipe, schedule):
    chosen = Settings().updated(f"recipe={recipe},schedule={schedule}")
    assert {key: getattr(chosen, key) for key in SCHEDULES[schedule]} == SCHEDULES[schedule]
    assert (chosen.steps, chosen.lr) == (RECIPES[recipe]["steps"], RECIPES[recipe]["lr"])


def test_sgd_brings_a_rate_of_its_own():
    assert Settings().updated("optimizer=sgd").lr == OPTIMIZERS["sgd"]["lr"]
    assert Settings().updated("recipe=long,optimizer=sgd").lr == OPTIMIZERS["sgd"]["lr"]
    assert Settings().updated("optimizer=sgd,lr=0.01").lr == 0.01
    assert Settings().updated("recipe=long,optimizer=adamw") == Settings().updated("recipe=long")


def test_names_tell_the_recipe_and_what_differs_from_it():
    def suffix(text):
        return Settings().updated(text).suffix()

    assert suffix("recipe=paper,schedule=paper") == ""
    assert suffix("recipe=long") == "_recipe-long"
    assert suffix("recipe=long,steps=500,freeze_share=0") == "_recipe-long_steps500"
    assert suffix("recipe=long,schedule=sawtooth") == "_recipe-long_schedule-sawtooth"
    assert suffix("schedule=sawtooth,optimizer=sgd") == "_schedule-sawtooth_optimizer-sgd"
    assert suffix("schedule=sawtooth,freeze_share=0.1,loss=dice_topk") == "_schedule-sawtooth_freeze0.1_loss-dice_topk"


def test_plans_written_before_there_were_recipes_are_the_papers_under_their_old_name():
    written = {"steps": 500, "epoch_steps": 250, "freeze_share": 0.3, "lr": 5e-4, "encoder_lr": None}
    written |= {"patch_size": [64, 64, 64], "batch_size": None, "fraction": 100, "seed": 0, "name": ""}
    plans = {"plans_name": "nnUNetPlans_steps500_patch64x64x64", "configurations": {}}
    plans["nnunet_ssl"] = {"base": "nnUNetPlans", "settings": written}
    opened = Settings.of_plans(plans)
    assert opened == Settings(steps=500, patch_size=(64, 64, 64))
    assert plans_with_settings(plans, opened)["plans_name"] == plans["plans_name"]


@pytest.mark.parametrize(
    ("share", "epochs", "averaged"), [(0.0, 20, 0), (0.1, 20, 2), (0.1, 1000, 100), (0.1, 2, 1), (0.5, 3, 2)]
)
def test_the_mean_is_over_the_last_share_of_the_epochs(share, epochs, averaged):
    chosen = Settings(steps=epochs, epoch_steps=1, average_share=share)
    assert chosen.averaged_epochs == averaged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=3", "There is no key 'step'; did you mean 'steps'?"),
        ("momentum=3", "Keys here: recipe, steps, epoch_steps"),
        ("steps=many", "steps is 'many'; it takes a whole number"),
        ("steps=5e2", "steps is '5e2'; it takes a whole number"),
        ("steps", "steps is ''; it takes a whole number"),
        ("lr=fast", "lr is 'fast'; it takes a number"),
        ("patch_size=96x96", "it takes 3 values"),
        ("patch_size=96x96x9.6", "patch_size[2] is '9.6'; it takes a whole number"),
        ("patch_size=96x0x96", "patch_size[1] is 0; it must be at least 1"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("steps=300", "not a whole number of epochs of epoch_steps=250"),
        ("fraction=0", "fraction is 0; it must be 1 to 100"),
        ("freeze_share=1", "at least 0 and below 1"),
        ("lr=nan", "lr is nan; it must be above 0 and below 1"),
        ("encoder_lr=-1", "above 0 and below 1"),
        ("encoder_lr=none", "it takes a number"),
        ("batch_size=0", "at least 1"),
        ("seed=-1", "seed is -1; it must be 0 or more"),
        ("recipe=best", "recipe is 'best'; it can be paper, long, primus, quick"),
        ("schedule=cosine", "schedule is 'cosine'; it can be paper, warmup, sawtooth"),
        ("decay=step", "decay is 'step'; it can be cosine, poly"),
        ("optimizer=SGD", "optimizer is 'SGD'; it can be adamw, sgd"),
        ("decoder=fpn", "decoder is 'fpn'; it can be random, pretrained, unet"),
        ("deep_supervision=1", "deep_supervision is '1'; it takes"),
        ("loss=blob", "loss is 'blob'; it can be dice_ce, dice_topk"),
        ("augmentation=cuda", "augmentation is 'cuda'; it can be cpu, gpu"),
        ("merging=monai_2", "merging is 'monai_2'; it can be monai, monai_1.4, mergingv2"),
        ("schedule=warmup,freeze_share=0.3", "trains all from the first step, so freeze_share=0.3 contradicts it"),
        ("recipe=long,freeze_share=0.3", "trains all from the first step, so freeze_share=0.3 contradicts it"),
        ("schedule=sawtooth,freeze_share=0", "freeze_share=0.0 of steps=5000 is no step"),
        ("schedule=sawtooth,steps=8", "freeze_share=0.05 of steps=8 is no step"),
        ("schedule=sawtooth,freeze_share=0.6,warmup_share=0.4", "would never decay"),
        ("warmup_share=-0.1", "at least 0 and below 1"),
        ("average_share=1", "at least 0 and below 1"),
        ("average_share=0.7", "reaches back into the 0.35 of the steps"),
        ("name=a__b", "letters and digits"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(UserError, match="nnssl_settings") as error:
        Settings().updated(text)
    assert message in str(error.value)
