"""Settings: what may be written, what is refused, and that two of them never share a name."""

import dataclasses
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunet_ssl.architectures.swin import MERGINGS
from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.plans import plans_with_settings
from nnunet_ssl.trainers.settings import Settings

rates = st.floats(1e-9, 0.5)
all_settings = st.builds(
    Settings,
    steps=st.integers(1, 40).map(lambda epochs: 250 * epochs),
    freeze_share=st.floats(0, 0.99),
    lr=rates,
    encoder_lr=st.none() | rates,
    patch_size=st.none() | st.tuples(*[st.integers(1, 320)] * 3),
    batch_size=st.none() | st.integers(1, 64),
    fraction=st.integers(1, 100),
    merging=st.none() | st.sampled_from(sorted(MERGINGS)),
    seed=st.integers(0, 10**6),
    name=st.text("abcXYZ019", max_size=5) | st.sampled_from(["seed1", "lr", "steps500"]),
)


def as_text(given_settings):
    """Write settings as a user would, the defaults that are None left out."""
    values = {key: value for key, value in dataclasses.asdict(given_settings).items() if value is not None}
    written = {key: "x".join(map(str, value)) if key == "patch_size" else value for key, value in values.items()}
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


def test_defaults_add_nothing_to_the_name():
    assert Settings().suffix() == "" == Settings().updated("steps=5000, fraction=100").suffix()
    assert Settings().updated("steps=500,patch_size=64x96x64").suffix() == "_steps500_patch64x96x64"


def test_later_settings_take_the_place_of_earlier_ones_and_keep_the_rest():
    assert Settings(steps=500).updated("lr=0.001") == Settings(steps=500, lr=0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=3", "no key 'step': did you mean steps?"),
        ("momentum=3", "known are steps, epoch_steps"),
        ("steps=many", "'many' is not a value for steps"),
        ("steps", "'' is not a value for steps"),
        ("patch_size=96", "three positive numbers"),
        ("patch_size=96x0x96", "three positive numbers"),
        ("steps=300", "not a whole number of epochs of epoch_steps=250"),
        ("fraction=0", "1 to 100"),
        ("freeze_share=1", "below 1"),
        ("lr=nan", "between 0 and 1"),
        ("encoder_lr=-1", "between 0 and 1"),
        ("batch_size=0", "at least 1"),
        ("seed=-1", "not be negative"),
        ("name=a__b", "letters and digits"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(UserError, match="nnssl_settings") as error:
        Settings().updated(text)
    assert message in str(error.value)
