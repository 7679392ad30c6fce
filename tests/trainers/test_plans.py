"""Settings in plans, and which configurations are refused."""

import json

import pytest
import tiny_models

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.plans import check_configuration, offer_plans, plans_with_settings, refuse_stale, saved_plans
from nnunet_ssl.trainers.settings import Settings

PLANS = {
    "plans_name": "nnUNetPlans",
    "configurations": {
        "2d": {"patch_size": [64, 64], "batch_size": 12},
        "3d_fullres": {"patch_size": [64, 64, 64], "batch_size": 2},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}
CHOSEN = Settings(steps=500, patch_size=(32, 48, 32), batch_size=4)


def test_settings_change_the_name_and_the_3d_configurations_and_leave_the_given_plans_alone():
    before = json.dumps(PLANS)
    plans = plans_with_settings(PLANS, CHOSEN)
    assert plans["plans_name"] == "nnUNetPlans_steps500_patch32x48x32_batch4"
    assert plans["configurations"]["3d_fullres"] == {"patch_size": [32, 48, 32], "batch_size": 4}
    assert plans["configurations"]["2d"] == PLANS["configurations"]["2d"]
    assert json.dumps(PLANS) == before


def test_plans_that_have_settings_are_named_after_the_plans_they_came_from():
    again = plans_with_settings(plans_with_settings(PLANS, Settings(steps=500)), CHOSEN)
    assert again == plans_with_settings(PLANS, CHOSEN)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("2d", "train 3d_fullres or 3d_lowres, not 2d"),
        ("3d_cascade_fullres", "second stage of a cascade"),
        ("3d_lowres", "they have: 2d, 3d_fullres, 3d_cascade_fullres"),
    ],
)
def test_a_configuration_that_cannot_be_fine_tuned_is_refused(configuration, message):
    with pytest.raises(UserError, match=message):
        check_configuration(PLANS, configuration)


def test_offered_plans_are_what_nnunet_reads_and_a_read_only_folder_does_not_stop_a_training(tmp_path):
    plans = plans_with_settings(PLANS, CHOSEN)
    offer_plans(plans | {"continue_training": True}, tmp_path)
    assert json.loads((tmp_path / f"{plans['plans_name']}.json").read_text()) == json.loads(json.dumps(plans))
    (tmp_path / "file").touch()
    offer_plans(plans, tmp_path / "file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing", [1.0, 1.0, 1.0]),
        ("normalization_schemes", ["NoNormalization"]),
        ("use_mask_for_norm", [True]),
        ("resampling_fn_data", "resample_torch_fornnunet"),
        ("image_reader_writer", "SimpleITKIO"),
        ("transpose_forward", [2, 0, 1]),
    ],
)
def test_plans_whose_base_was_planned_anew_are_refused_where_the_data_would_be_others(tmp_path, key, value):
    base = tiny_models.plans()
    plans = plans_with_settings(base, CHOSEN)
    refuse_stale(plans, "3d_fullres", tmp_path)  # nothing is known of the base
    anew = json.loads(json.dumps(base))
    anew["configurations"]["3d_fullres"] |= {"patch_size": [8, 8, 8], "batch_size": 9}
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(anew))
    refuse_stale(plans, "3d_fullres", tmp_path)
    (anew if key in anew else anew["configurations"]["3d_fullres"])[key] = value
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(anew))
    with pytest.raises(UserError, match=f"planned anew, with another {key}.*begin with -p nnUNetPlans"):
        refuse_stale(plans, "3d_fullres", tmp_path)


def test_plans_whose_base_lost_the_configuration_when_it_was_planned_anew_are_refused(tmp_path):
    base = tiny_models.plans()
    base["configurations"]["3d_lowres"] = base["configurations"]["3d_fullres"]
    plans = plans_with_settings(base, CHOSEN)
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(tiny_models.plans()))
    with pytest.raises(UserError, match="The plans nnUNetPlans have no configuration 3d_lowres; they have: 3d_fullres"):
        refuse_stale(plans, "3d_lowres", tmp_path)


def test_a_model_without_plans_is_named(tmp_path):
    with pytest.raises(UserError, match=r"plans\.json is missing"):
        saved_plans(tmp_path)
