"""The configuration: recipes, overrides, and errors that help."""

import pytest
import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import PretrainingConfig, from_dict, load_config
from nnunet_ssl.pretraining.objectives.lesions import LesionSearchConfig
from nnunet_ssl.pretraining.recipes import recipes
from nnunet_ssl.schedules import Ramp

ALL = ("cl", "cl_mim", "mcl", "mcl_dense", "mcl_ibot", "mcl_mim", "mcl_mim_balanced", "mcl_path", "mim")


def test_the_recipes_ship_with_the_package():
    assert recipes() == sorted(ALL)


@pytest.mark.parametrize("recipe", ALL)
def test_a_recipe_survives_yaml(recipe):
    config = load_config(recipe)
    assert config.recipe == recipe
    assert from_dict(yaml.safe_load(config.as_yaml())) == config
    assert from_dict(config.as_dict()) == config


def test_defaults_are_the_papers():
    config = load_config("mcl_mim")
    assert (config.steps, config.batch_size, config.patch_size) == (200_000, 16, (96, 96, 96))
    assert (config.learning_rate, config.minimum_learning_rate, config.weight_decay) == (1e-4, 1e-5, 0.01)
    assert (config.warmup, config.gradient_clip, config.queue_size) == (0.02, 10.0, 16384)
    assert (config.contrastive.temperature, config.contrastive.hidden, config.contrastive.dim) == (0.2, 512, 128)
    assert config.contrastive.weight == Ramp(low=0.1, high=1.0, begin=0.05, until=0.10)
    assert config.momentum == Ramp(low=0.996, high=0.999, begin=0.05, until=0.20)
    assert (config.masked.ratio, config.masked.width, config.validation.fraction) == ((0.5, 0.75), 32, 0.02)
    assert config.architecture() == {
        "backbone": "swin",
        "in_channels": 1,
        "embed_dim": 48,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "conv_norm": "group",
        "mask_token": True,
    }


def test_the_recipes_differ_in_what_their_names_say():
    branches = {name: (load_config(name).contrastive.pairs, load_config(name).masked.target) for name in ALL}
    assert branches == {
        "cl": ("cl", "none"),
        "cl_mim": ("cl", "voxels"),
        "mcl": ("mcl", "none"),
        "mcl_dense": ("mcl", "none"),
        "mcl_ibot": ("mcl", "tokens"),
        "mcl_mim": ("mcl", "voxels"),
        "mcl_mim_balanced": ("mcl", "voxels"),
        "mcl_path": ("mcl", "none"),
        "mim": ("none", "voxels"),
    }
    assert load_config("mcl_mim_balanced").contrastive.max_gradient_ratio == 1.0
    assert {name for name in ALL if load_config(name).lesions} == {"mcl_path"}
    assert {name for name in ALL if load_config(name).dense} == {"mcl_dense"}


def test_overrides_reach_nested_keys_in_every_form():
    config = load_config(
        "mcl_mim",
        [
            "swin.depths=2,2,2",
            "swin.num_heads=[3, 6, 12]",
            "learning_rate=2e-4",
            "patch_size=64",
            "masked.ratio=[0.6, 0.6]",
            "contrastive.max_gradient_ratio=2",
            "shared_pass=true",
        ],
    )
    assert config.swin.depths == (2, 2, 2)
    assert config.stride == 16
    assert config.learning_rate == 2e-4
    assert config.patch_size == (64, 64, 64)
    assert config.contrastive.max_gradient_ratio == 2.0
    assert config.shared_pass is True


def test_an_override_leaves_its_neighbours_at_their_defaults():
    assert load_config("mcl_mim", ["momentum.high=0.9995"]).momentum == Ramp(
        low=0.996, high=0.9995, begin=0.05, until=0.20
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("swinn.embed_dim=24", "no key 'swinn'; did you mean 'swin'"),
        ("swin.embd_dim=24", "no key 'swin.embd_dim'; did you mean 'swin.embed_dim'"),
        ("others.swin=1", "no key 'others'"),
        ("steps=1.5", "steps is 1.5; it takes a whole number"),
        ("workers=true", "workers is True; it takes a whole number"),
        ("learning_rate=fast", "learning_rate is 'fast'; it takes a number"),
        ("contrastive.pairs=both", "contrastive.pairs is 'both'; it can be mcl, cl, none"),
        ("masked.ratio=[0.1, 0.2, 0.3]", "masked.ratio is .*; it takes 2 values"),
        ("masked.ratio=[0.8, 0.3]", "masked.ratio is .*low <= high"),
        ("contrastive=3", "contrastive is 3; it takes keys"),
        ("steps", "not of the form key=value"),
        ("steps.x=3", "steps is .*; it takes a whole number"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("swin.window_size=0", "swin.window_size is 0; it must be at least 1"),
        ("learning_rate=nan", "learning_rate is nan; it must be positive"),
        ("learning_rate=1e-6", "minimum_learning_rate is 1e-05, above learning_rate 1e-06"),
        ("momentum.high=1.5", "momentum.high is 1.5; it must be between 0 and 1"),
        ("validation.batches=-1", "validation.batches is -1; it must be 0 or more"),
        ("patch_size=32", "single cell of 32 voxels"),
        ("masked.tokens.level=5", None),
        ("recipe=../elsewhere", "it names a folder"),
        ("momentum.until=0.01", "begin <= until"),
        ("momentum.hihg=1", "did you mean 'momentum.high'"),
        ("masked.tokens.student_temperature=0", "masked.tokens.student_temperature is 0.0; it must be positive"),
        ("masked.tokens.teacher_temperature.low=-1", "teacher_temperature.low is -1.0; it must be positive"),
        ("masked.tokens.view=both", "masked.tokens.view is 'both'; it can be other, own"),
        ("contrastive.temperature=0", "contrastive.temperature is 0.0; it must be positive"),
    ],
)
def test_a_bad_override_is_explained(override, message):
    if message is None:  # irrelevant to this recipe, so not in the way
        load_config("mcl_mim", [override])
        return
    with pytest.raises(UserError, match=message):
        load_config("mcl_mim", [override])


def test_choices_that_need_two_branches_are_refused_for_one():
    with pytest.raises(UserError, match="shared_pass needs"):
        load_config("mcl", ["shared_pass=true"])
    with pytest.raises(UserError, match="max_gradient_ratio needs"):
        load_config("mcl", ["contrastive.max_gradient_ratio=1"])
    with pytest.raises(UserError, match="nothing to learn"):
        load_config("mim", ["masked.target=none"])
    with pytest.raises(UserError, match=r"place by place: set augmentation.shared_affine=true"):
        load_config("mcl_ibot", ["augmentation.shared_affine=false"])
    with pytest.raises(UserError, match="maps are 0 to 4"):
        load_config("mcl_ibot", ["masked.tokens.level=5"])
    with pytest.raises(UserError, match=r"leave the encoder beyond it untrained: set masked\.tokens\.level=4"):
        load_config("mcl_ibot", ["contrastive.pairs=none"])


@pytest.mark.parametrize("kind", ["clip", "equal_norms", "learning_rates"])
def test_a_balance_has_a_number_for_each_branch(kind):
    config = load_config("mcl_mim", [f"balance={kind}", "branches.masked=0.5"])
    assert config.branch_numbers == {"contrastive": 1.0, "masked": 0.5}
    assert from_dict(yaml.safe_load(config.as_yaml())) == config
    assert load_config("mcl_ibot", [f"balance={kind}", "branches={contrastive: 2}"]).branch_numbers["contrastive"] == 2


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "mcl",
            ["balance=clip"],
            "balance is clip, but the recipe 'mcl' has a single branch, contrastive, with nothing",
        ),
        ("mim", ["balance=learning_rates"], "has a single branch, masked"),
        ("mcl_mim_balanced", ["balance=equal_norms"], r"contrastive.max_gradient_ratio is set, .*choose one"),
        ("mcl_mim", ["branches.masked=2"], "branches has numbers for masked, which balance=sum does not use"),
        ("mcl_mim", ["balance=clip", "branches.mask=2"], r"number for mask; the branches .* contrastive and masked"),
        ("mcl_mim", ["balance=clip", "branches.masked=0"], "branches.masked is 0.0; it must be positive"),
        ("mcl_mim", ["balance=clip", "branches.masked=.nan"], "branches.masked is nan; it must be positive"),
        ("mcl_mim", ["balance=clip", "branches.masked=much"], "branches.masked is 'much'; it takes a number"),
        ("mcl_mim", ["balance=clip", "branches=2"], "branches is 2; it takes a value for each name"),
        ("mcl", ["sampling.weighting=subject"], "sampling.weighting is 'subject'; it can be scan, session, source"),
        ("mcl", ["sampling.jitter_mm=-1"], "sampling.jitter_mm is -1.0; it must be 0 or more"),
        ("mcl", ["sampling.max_failed_share=2"], "sampling.max_failed_share is 2.0; it must be between 0 and 1"),
        ("mcl", ["validation.fraction=1"], "validation.fraction is 1.0; it must be above 0 and below 1"),
        ("mcl_mim", ["contrastive.max_gradient_ratio=0"], "max_gradient_ratio is 0.0; it must be positive"),
        ("mcl_mim", ["balance=gradnorm"], "balance is 'gradnorm'; it can be sum, clip, equal_norms, learning_rates"),
    ],
)
def test_settings_that_do_not_fit_are_explained_in_a_sentence(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, overrides)


def test_a_branch_is_turned_on_by_its_section_and_off_by_null():
    config = load_config("mcl_mim", ["lesions.weight=0.5"])
    assert [objective.name for objective in config.objectives] == ["contrastive", "masked", "lesions"]
    assert load_config("mcl_path", ["lesions=null"]).objectives[-1].name == "contrastive"
    assert from_dict(config.as_dict()).lesions == config.lesions != load_config("mcl_path").lesions


def test_a_section_that_is_null_in_a_file_is_turned_on_by_a_key_of_it(tmp_path):
    """As the files are that a run leaves, and --print_config."""
    path = tmp_path / "mine.yaml"
    path.write_text(load_config("mcl_mim").as_yaml())
    config = load_config(path, ["lesions.weight=0.5", "dense=null"])
    assert config.lesions == LesionSearchConfig(weight=0.5) and config.dense is None
    with pytest.raises(UserError, match=r"no key 'lesions\.wight'; did you mean 'lesions\.weight'"):
        load_config(path, ["lesions.wight=0.5"])


def test_every_temperature_and_the_target_of_mcl_ibot_can_be_swept():
    swept = ["contrastive.temperature=0.3", "masked.tokens.student_temperature=0.2", "masked.tokens.view=own"]
    config = load_config("mcl_ibot", [*swept, "masked.tokens.teacher_temperature={low: 0.1, high: 0.1}"])
    tokens = config.masked.tokens
    assert (config.contrastive.temperature, tokens.student_temperature, tokens.view) == (0.3, 0.2, "own")
    assert tokens.teacher_temperature == Ramp(low=0.1, high=0.1, until=0.1)
    assert load_config("mcl_ibot", ["masked.tokens.view=own", "augmentation.shared_affine=false"]).has_masked


def test_a_file_can_be_a_recipe_and_gives_it_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("contrastive: {pairs: cl}\nsteps: 10\n")
    config = load_config(path)
    assert (config.recipe, config.steps, config.contrastive.pairs) == ("mine", 10, "cl")


def test_files_that_are_no_recipe_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'mlc'.*cl_mim, mcl"):
        load_config("mlc")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="must hold 'key: value' lines"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("steps: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="'recipe' is missing"):
        from_dict({"contrastive": {"pairs": "cl"}})


def test_a_ramp_rises_between_its_two_shares():
    ramp = Ramp(low=0.1, high=1.0, begin=0.05, until=0.10)
    assert ramp.at(0, 1000) == ramp.at(50, 1000) == pytest.approx(0.1)
    assert ramp.at(75, 1000) == pytest.approx(0.55)
    assert ramp.at(100, 1000) == ramp.at(999, 1000) == 1.0


def test_the_configuration_cannot_be_changed_afterwards():
    config = load_config("mim")
    with pytest.raises(AttributeError):
        config.steps = 3
    assert isinstance(config, PretrainingConfig)


def test_settings_of_0_1_0_are_read_with_a_hint(caplog):
    """Its section for the Swin encoder was called "encoder", in files and on command lines."""
    caplog.set_level("INFO")
    config = load_config("mim", ["encoder.embed_dim=24", "swin.window_size=6"])
    assert (config.swin.embed_dim, config.swin.window_size) == (24, 6)
    assert "write swin.embed_dim for encoder.embed_dim" in caplog.text
    written = config.as_dict()
    written["encoder"] = written.pop("swin")
    assert from_dict(written) == config
    with pytest.raises(UserError, match="swin is 3; it takes keys"):
        load_config("mim", ["encoder=3"])
