import itertools
from collections import Counter
from typing import get_args, get_type_hints

import pytest
import yaml
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_5epochs

from nnunet_ssl.conversion.fcd_bonn import INFO as BONN
from nnunet_ssl.conversion.isles2022 import INFO as ISLES
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.studies.study import Measurement, Run
from nnunet_ssl.studies.study_file import read_study, shipped, study_from
from nnunet_ssl.trainers.settings import Settings
from nnunet_ssl.weights.zoo import entries, named_checkpoint

MINIMAL = """
name: small
arms:
  scratch: {trainer: nnUNetTrainerSwinFPNScratch}
  mcl_mim: {label: MCL+MIM, trainer: nnUNetTrainerMCLMIM}
datasets:
  atlas: {id: 501, preset: atlas}
  dwi: {id: 510}
experiments:
  fractions: {datasets: [atlas], fractions: [100, 50], folds: [0, 1], seeds: [0, 1]}
"""


def changed(**changes):
    """The minimal study with nested keys (double underscores) set."""
    values = yaml.safe_load(MINIMAL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return values


def test_the_shipped_study_is_the_papers_three_experiments():
    study = read_study("paper")
    runs = study.runs()
    trainings = [run for run in runs if isinstance(run, Run)]
    assert len(trainings) == 6 * 4 + 6 * 5
    assert Counter(run.dataset for run in trainings)["atlas_t1"] == 24
    assert Counter(run.arm for run in trainings) == dict.fromkeys(study.arms, 9)
    assert Counter(run.fraction for run in trainings) == {100: 36, 75: 6, 50: 6, 25: 6}
    assert {(run.fold, run.seed) for run in trainings} == {(0, 0)}
    assert [run.arm for run in runs if isinstance(run, Measurement)] == ["cl", "mcl", "mim", "cl_mim", "mcl_mim"]
    assert len({run.id for run in runs}) == len(runs) == 59


def test_the_shipped_study_quotes_the_paper():
    experiments = read_study("paper").experiments
    fractions, modalities = experiments["sample_efficiency"], experiments["modalities"]
    assert dict(zip(fractions.columns, fractions.published.values["mcl"]))["atlas_t1", 50] == 0.4892
    assert dict(zip(modalities.columns, modalities.published.values["cl_mim"]))["fcd_t1", 100] == 0.1701
    assert experiments["alignment"].published.values == {"cl": [0.5995, 0.1576], "mcl": [0.0066, 0.0104]}


def test_the_shipped_recipes_change_one_setting_each_and_take_as_many_steps_as_their_peers():
    study = read_study("recipes")
    lengths = {"steps": 500, "epoch_steps": 100}
    taken = {run.arm: run.settings for run in study.runs() if isinstance(run, Run)}
    assert taken.pop("nnunet") == ""
    own = {name: Settings().updated(settings) for name, settings in taken.items()}
    as_nnunet = [own.pop(name) for name in ("resenc", "resenc_scratch")]
    assert as_nnunet[0] == as_nnunet[1] and as_nnunet[0].steps == 1250, "of five epochs of nnU-Net's"
    assert all({key: getattr(one, key) for key in lengths} == lengths for one in own.values())
    assert nnUNetTrainer_5epochs.__name__ == study.arms["nnunet"].trainer
    alone = [one for one in own.values() if one.recipe == "paper"]
    for key in ("schedule", "decoder", "loss", "optimizer"):
        choices = set(get_args(get_type_hints(Settings)[key])) - {"adamw_primus"}  # another backbone's
        others = Counter(value for one in alone if (value := getattr(one, key)) != getattr(Settings(), key))
        assert others == dict.fromkeys(choices - {getattr(Settings(), key)}, 1)
    assert sum(one.average_share > 0 for one in alone) == 1 and own["long"].averaged_epochs == 1
    assert {run.seed for run in study.runs() if isinstance(run, Run)} == {0}, "plain nnU-Net has none"


def test_the_shipped_datasets_are_those_that_the_conversion_scripts_write():
    study = read_study("paper")
    for name, info, channel in (("isles_dwi", ISLES, "dwi"), ("isles_adc", ISLES, "adc"), ("fcd_t1", BONN, "t1")):
        assert info.numbers[channel,] == study.datasets[name].id


def test_the_matrix_is_the_product_and_first_folds_come_first():
    runs = study_from(yaml.safe_load(MINIMAL)).runs()
    assert len(runs) == 2 * 2 * 2 * 2
    assert [(run.seed, run.fold) for run in runs[::4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert runs[0].settings == ""
    assert runs[-1].settings == "fraction=50,seed=1"
    assert runs[-1].suffix == "_fraction50_seed1"


def test_a_run_that_two_experiments_share_is_run_once():
    values = changed(experiments__all={"datasets": ["atlas", "dwi"]})
    study = study_from(values)
    shared = set(study.runs_of(study.experiments["fractions"])) & set(study.runs_of(study.experiments["all"]))
    assert {run.dataset for run in shared} == {"atlas"}
    assert len(study.runs()) == 16 + 4 - 2


def test_settings_of_an_arm_come_on_top_of_the_studys():
    study = study_from(changed(settings="steps=500, lr=1e-3", arms__mcl_mim__settings="lr=2e-3"))
    settings = {run.arm: run.settings for run in study.runs() if (run.fraction, run.seed) == (100, 0)}
    assert settings == {"scratch": "steps=500,lr=1e-3", "mcl_mim": "steps=500,lr=2e-3"}


def test_each_arm_is_compared_with_the_first_unless_pairs_are_named():
    assert study_from(changed()).experiments["fractions"].compare == (("mcl_mim", "scratch"),)
    named = study_from(changed(experiments__fractions__compare=[["scratch", "mcl_mim"]]))
    assert named.experiments["fractions"].compare == (("scratch", "mcl_mim"),)


def test_arms_that_nnunet_would_keep_in_one_folder_need_their_own_checkpoints():
    twin = {"trainer": "nnUNetTrainerMCLMIM"}
    with pytest.raises(UserError, match="have one trainer and equal settings"):
        study_from(changed(arms__twin=twin))
    assert study_from(changed(arms__twin=twin | {"checkpoint": "a.ckpt"}))
    assert study_from(changed(arms__twin=twin | {"settings": "lr=1e-3"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "There is no key 'arm'"),
        ({"arms": {}}, "'arms' must name at least one"),
        ({"arms__scratch": "x"}, "arms.scratch is 'x'; it takes keys: label, trainer"),
        ({"arms__a b": {"trainer": "T"}}, "'a b' becomes part of file names"),
        ({"name": "a/b"}, "'a/b' becomes part of file names"),
        ({"datasets__dwi__id": "510"}, "datasets.dwi.id is '510'; it takes a whole number"),
        ({"datasets__dwi__preset": "brats"}, "datasets.dwi.preset is 'brats'; it can be isles, isles26, atlas, fcd"),
        ({"settings": "stps=5"}, "no key 'stps'; did you mean 'steps'"),
        ({"experiments__fractions__fractions": [0]}, "fraction is 0; it must be 1 to 100"),
        ({"experiments__fractions__datasets": ["dvi"]}, "experiments.fractions speaks of 'dvi', which is none"),
        ({"experiments__fractions__arms": ["cl"]}, "'cl', which is none of the arms: scratch, mcl_mim"),
        ({"experiments__fractions__metrics": ["iou"]}, "'iou', which is none of the metrics: dice"),
        ({"experiments__fractions__datasets": []}, "experiments.fractions.datasets must name at least one"),
        ({"experiments__fractions__fold": [0]}, "'experiments.fractions.fold'; did you mean"),
        (
            {"experiments__fractions__published": {"source": "s", "values": {"scratch": [0.1]}}},
            "published.values.scratch must be a list of 2 numbers",
        ),
        *(
            ({f"experiments__fractions__{key}": []}, f"experiments.fractions.{key} must name at least one")
            for key in ("metrics", "fractions", "folds", "seeds")
        ),
        (
            {"experiments__fractions__published": {"source": "s", "values": [0.1, 0.2]}},
            "published.values is .0.1, 0.2.; it takes a list of numbers per arm",
        ),
        (
            {"experiments__fractions__published": {"source": "s", "values": {"scratch": ["a", 0.2]}}},
            "published.values.scratch must be a list of 2 numbers",
        ),
        ({"experiments__fractions__published": {"source": "s"}}, "published takes the keys source and values"),
        ({"synthetic": {"corpus": "make it"}}, "synthetic.corpus is 'make it'; it takes a list of commands"),
        ({"arms__scratch__pretraining": "steps=5"}, "arms.scratch has settings of a pre-training and no recipe"),
        ({"arms__scratch": {"recipe": "mcl", "checkpoint": "a"}}, "arms.scratch has a recipe and a checkpoint"),
        ({"arms__scratch": {"recipe": "mcl", "pretraining": "stps=5"}}, "arms.scratch cannot be pre-trained: .*steps"),
        ({"arms__scratch": {"recipe": "ncl"}}, "arms.scratch cannot be pre-trained: There is no recipe 'ncl'"),
        ({"datasets__dwi__tests": {"x": "flair"}}, "datasets.dwi.tests speaks of 'flair'"),
        ({"datasets__dwi__tests": {"validation": "atlas"}}, "datasets.dwi.tests.validation names a folder"),
        ({"datasets__dwi__tests": ["atlas"]}, "datasets.dwi.tests is .'atlas'.; it takes names"),
        ({"experiments__fractions__kind": "gradients"}, "reads what pre-trainings recorded, and arms.scratch has no"),
        (
            {"experiments__fractions__down": "datasets", "experiments__fractions__compare": [["mcl_mim", "scratch"]]},
            "speaks of 'mcl_mim', which is none of the datasets",
        ),
    ],
)
def test_mistakes_in_a_study_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        study_from(changed(**changes))


def test_files_that_hold_no_study_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no file nowhere, and no study of that name .*: .*paper"):
        read_study("nowhere")
    path = tmp_path / "study.yaml"
    for text, message in (("[1", "is not YAML"), ("- 1", "holds no keys"), ("name: x", "'arms' must name")):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            read_study(str(path))
        assert str(error.value).startswith(str(path))


def test_every_shipped_study_can_be_read_at_either_size():
    assert "paper" in shipped()
    for name, path in shipped().items():
        assert read_study(name).name == name
        if "full" in yaml.safe_load(path.read_text()):
            assert read_study(name, full=True).name == f"{name}_full"
        else:
            with pytest.raises(UserError, match="no key 'full'"):
                read_study(name, full=True)


OPEN_QUESTIONS = ("gradients", "pathology", "raters", "tasks", "tokens")
SYNTHETIC = (*OPEN_QUESTIONS, "missing", "recipes")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_at_full_size_a_study_has_the_recipes_own_sizes_and_asks_the_same(name):
    small, full = read_study(name), read_study(name, full=True)
    assert list(full.arms) == list(small.arms) and list(full.experiments) == list(small.experiments)
    for arm in full.arms:
        if one := full.pretraining_of(arm, seed=0):
            assert load_config(one.recipe, list(one.settings)).swin == load_config(one.recipe).swin
    for key, experiment in full.experiments.items():
        assert experiment.compare == small.experiments[key].compare
        assert set(experiment.datasets) >= set(small.experiments[key].datasets)
    assert not any("voxel_mm 4" in command for commands in full.synthetic.values() for command in commands)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_no_model_of_a_synthetic_study_is_tried_on_what_it_was_trained_on(name, full):
    study = read_study(name, full=full)
    trained_on = {study.datasets[run.dataset].id for run in study.runs() if isinstance(run, Run)}
    tested_on = {study.datasets[test].id for dataset in study.datasets.values() for test in dataset.tests.values()}
    assert not trained_on & tested_on


@pytest.mark.parametrize("name", SYNTHETIC)
def test_no_synthetic_head_is_pre_trained_on_and_then_labelled(name):
    """A seed and a number are a head, whatever the layout."""
    heads = {True: set(), False: set()}
    for command in itertools.chain(*read_study(name).synthetic.values()):
        words = command.split()
        if "nnunet_ssl.phantom" in words:
            seed = words[words.index("--seed") + 1] if "--seed" in words else "0"
            heads["fomo" in words].add(seed)
    assert heads[True] == {"0"} and not heads[True] & heads[False]


@pytest.mark.parametrize("name", OPEN_QUESTIONS)
def test_the_arms_of_an_open_question_are_trained_for_equally_long(name):
    study = read_study(name)
    configs = [
        load_config(one.recipe, list(one.settings)) for arm in study.arms if (one := study.pretraining_of(arm, 0))
    ]
    assert len({(one.steps, one.batch_size, one.patch_size, one.swin) for one in configs}) == 1
    assert not any(arm.settings for arm in study.arms.values())


def test_no_line_of_a_shipped_study_is_longer_than_a_line_of_code():
    lines = [(name, line) for name, path in shipped().items() for line in path.read_text().splitlines()]
    assert [one for one in lines if len(one[1]) > 120] == []


def test_what_measures_encoders_measures_them_on_the_studys_corpus_unless_another_is_named():
    values = changed(
        corpus=600, experiments={"one": {"kind": "alignment"}, "other": {"kind": "alignment", "corpus": 7}}
    )
    assert {run.corpus for run in study_from(values).runs()} == {600, 7}


def test_runs_that_would_be_taken_for_each_other_are_refused():
    probes = {
        name: {"kind": "probe", "options": f"--target age --low {low}"} for name, low in (("a", "1"), ("b", "-1"))
    }
    with pytest.raises(
        UserError, match="Two different runs would keep their results as probe_target_age_low_1__scratch"
    ):
        study_from(changed(experiments=probes))
    arms = {"b": {"trainer": "nnUNetTrainerMCLMIM"}, "x__b": {"trainer": "nnUNetTrainerCL"}}
    values = changed(arms=arms, datasets={"a__x": {"id": 501}, "a": {"id": 510}})
    values["experiments"] = {"all": {"datasets": ["a__x", "a"]}}
    with pytest.raises(UserError, match="Two different runs would keep their results as a__x__b__fraction100"):
        study_from(values)


def test_published_weights_stand_beside_our_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    study = read_study("published")
    named = {arm.checkpoint for arm in study.arms.values() if arm.checkpoint}
    assert named <= entries().keys()
    with pytest.raises(UserError, match="nnssl_weights fetch openmind-mae"):
        named_checkpoint("openmind-mae")
    path = tmp_path / "zoo" / "openmind-mae" / "encoder.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert named_checkpoint("openmind-mae") == path
