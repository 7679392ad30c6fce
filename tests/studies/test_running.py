"""Execution of a study with programs that only note their calls; test_study_for_real.py has the real ones."""

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import nnunetv2
import numpy as np
import pytest
import yaml
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_ssl import commands
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import folder_of
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.studies import running
from nnunet_ssl.studies.changes import refuse_changes
from nnunet_ssl.studies.cli import study as command
from nnunet_ssl.studies.encoder_tables import compare_figures, read_figures, summarize_figures
from nnunet_ssl.studies.places import pretrained, results_of
from nnunet_ssl.studies.running import execute, execute_all, log_of, read_record, state_of
from nnunet_ssl.studies.stage import NOTE
from nnunet_ssl.studies.stages import stages_of
from nnunet_ssl.studies.study import Measurement, Pretraining
from nnunet_ssl.studies.study_file import study_from

STUDY = """
name: small
plans: nnUNetSSLPlans
arms:
  scratch: {trainer: nnUNetTrainerSwinFPNScratch}
  mcl_mim: {label: MCL+MIM, trainer: nnUNetTrainerMCLMIM}
datasets:
  atlas: {id: 501, preset: atlas}
experiments:
  fractions: {datasets: [atlas], fractions: [100, 50]}
"""
PROGRAMS = Path(__file__).with_name("fake_programs.sh")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of fake programs in the place of the real ones; the file of their calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("nnUNetv2_train", "nnUNetv2_predict", "nnssl_evaluate", "nnssl_pretrain", "maker"):
        shutil.copy(PROGRAMS, folder / name)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(commands, "find_program", lambda name: str(folder / name))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    return folder


@pytest.fixture
def calls(tmp_path, programs):
    """A function that returns the calls since it was asked last."""
    file = tmp_path / "calls"

    def since_last():
        lines = file.read_text().splitlines() if file.is_file() else []
        file.unlink(missing_ok=True)
        return lines

    return since_last


@pytest.fixture
def prepared(nnunet_folders):
    """Dataset501 as if converted and preprocessed, with a labelled test set, and a finished pre-training."""
    raw = nnunet_folders["nnUNet_raw"] / "Dataset501_ATLASv2"
    (raw / "labelsTs").mkdir(parents=True)
    (raw / "labelsTs" / "case.nii.gz").touch()
    preprocessed = nnunet_folders["nnUNet_preprocessed"] / raw.name
    (preprocessed / "nnUNetSSLPlans_3d_fullres").mkdir(parents=True)
    plans = {
        "plans_name": "nnUNetSSLPlans",
        "configurations": {"3d_fullres": {"data_identifier": "nnUNetSSLPlans_3d_fullres", "batch_size": 2}},
    }
    (preprocessed / "nnUNetSSLPlans.json").write_text(json.dumps(plans))
    encoder = nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    encoder.parent.mkdir(parents=True)
    encoder.touch()
    return nnunet_folders["nnUNet_results"]


@pytest.fixture
def folder(prepared):
    return prepared / "studies" / "small"


def small(**changes):
    return study_from(yaml.safe_load(STUDY) | changes)


def kinds(study, folder):
    return [state_of(run, study, folder, "cpu").kind for run in study.runs()]


def call(monkeypatch, tmp_path, *arguments, text=STUDY):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["nnssl_study", arguments[0], str(path), *map(str, arguments[1:])])
    command()


def test_a_run_is_trained_evaluated_predicted_and_evaluated_with_nnunets_own_commands(prepared, folder, calls):
    study = small()
    assert execute_all(study.runs(), study, folder, "cpu") == []
    seen = calls()
    assert len(seen) == 4 * 4
    assert kinds(study, folder) == ["finished"] * 4
    train, validation, predict, test = seen[8:12]
    model = prepared / "Dataset501_ATLASv2" / "nnUNetTrainerSwinFPNScratch__nnUNetSSLPlans_fraction50__3d_fullres"
    assert train == (
        "nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerSwinFPNScratch -p nnUNetSSLPlans -device cpu "
        "settings=fraction=50 checkpoint="
    )
    assert f"-pred {model}/fold_0/validation --preset atlas" in validation
    assert "--chill" in validation
    assert "-f 0 -tr nnUNetTrainerSwinFPNScratch -p nnUNetSSLPlans_fraction50 -device cpu" in predict
    assert f"-pred {model}/fold_0/test --preset atlas" in test
    assert "--chill" not in test


def test_with_residual_plans_alignment_is_measured_where_trainings_start(prepared, folder):
    alignment = {"alignment": {"kind": "alignment", "corpus": 500, "arms": ["mcl_mim"]}}
    study = small(experiments=yaml.safe_load(STUDY)["experiments"] | alignment)
    [run] = study.runs_of(study.experiments["alignment"])
    runs = {"PlainConvUNet": "mcl_mim", "ResidualEncoderUNet": "mcl_mim_resenc"}
    for name in ("mcl_mim", "mcl_mim_resenc"):
        (prepared / "Dataset500_FOMO60K" / name).mkdir(exist_ok=True)
        (prepared / "Dataset500_FOMO60K" / name / "encoder.safetensors").touch()
    (folder_of("nnUNet_preprocessed") / "Dataset500_FOMO60K").mkdir()
    [plans] = folder_of("nnUNet_preprocessed").glob("Dataset501_*/nnUNetSSLPlans.json")
    for network, name in runs.items():
        content = json.loads(plans.read_text())
        content["configurations"]["3d_fullres"]["architecture"] = {"network_class_name": f"networks.{network}"}
        plans.write_text(json.dumps(content))
        [measure] = stages_of(run, study, folder, "cpu")
        assert str(prepared / "Dataset500_FOMO60K" / name / "encoder.safetensors") in measure.command


def test_what_is_finished_is_never_repeated(folder, calls):
    study = small()
    execute_all(study.runs(), study, folder, "cpu")
    calls()
    assert execute_all(study.runs(), study, folder, "cpu") == []
    assert calls() == []


def finish_an_hour_ago(study, folder, results):
    """Execute the study's first run; return its fold."""
    execute(study.runs()[0], study, folder, "cpu")
    hour_ago = time.time() - 3600
    for path in results.rglob("*"):
        os.utime(path, (hour_ago, hour_ago))
    assert kinds(study, folder)[0] == "finished"
    return results / "Dataset501_ATLASv2" / "nnUNetTrainerSwinFPNScratch__nnUNetSSLPlans__3d_fullres" / "fold_0"


def redone(study, folder, calls):
    """The programs that a further execution of the study's first run calls."""
    assert state_of(study.runs()[0], study, folder, "cpu").kind != "finished"
    calls()
    assert execute(study.runs()[0], study, folder, "cpu") == "finished"
    assert state_of(study.runs()[0], study, folder, "cpu").kind == "finished"
    return [line.split()[0].removeprefix("nnUNetv2_").removeprefix("nnssl_") for line in calls()]


def test_a_fold_that_was_deleted_and_trained_again_is_evaluated_again(prepared, folder, calls):
    study = small()
    shutil.rmtree(finish_an_hour_ago(study, folder, prepared))
    assert redone(study, folder, calls) == ["train", "evaluate", "predict", "evaluate"]


def test_a_fold_that_was_trained_again_in_its_place_is_predicted_and_evaluated_again(prepared, folder, calls):
    study = small()
    fold = finish_an_hour_ago(study, folder, prepared)
    (fold / "checkpoint_final.pth").touch()
    (fold / "validation" / "summary.json").touch()
    assert redone(study, folder, calls) == ["evaluate", "predict", "evaluate"]


def test_a_training_that_ended_before_its_validation_is_validated(prepared, folder, calls):
    study = small()
    fold = finish_an_hour_ago(study, folder, prepared)
    (fold / "checkpoint_final.pth").touch()
    assert redone(study, folder, calls) == ["train", "evaluate", "predict", "evaluate"]


def test_what_does_not_depend_on_a_repeated_stage_stays(prepared, folder, calls):
    study = small()
    fold = finish_an_hour_ago(study, folder, prepared)
    (fold / "validation" / "summary.json").touch()
    assert redone(study, folder, calls) == ["evaluate"]


def test_scores_of_a_fold_that_is_gone_are_gone_as_soon_as_it_is_trained(prepared, folder, calls, monkeypatch):
    study = small()
    shutil.rmtree(finish_an_hour_ago(study, folder, prepared))
    monkeypatch.setenv("FAKE_FAILS", "nnUNetv2_train*")
    assert len(list(folder.rglob("lesions.json"))) == 2
    assert execute(study.runs()[0], study, folder, "cpu") == "failed"
    assert list(folder.rglob("lesions.json")) == []


def test_a_new_pre_training_is_measured_anew(nnunet_folders, prepared, folder, calls):
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K").mkdir()
    study = small(experiments={"alignment": {"kind": "alignment", "arms": ["mcl_mim"]}})
    assert execute_all(study.runs(), study, folder, "cpu") == []
    [measured], hour_ago = folder.rglob("alignment.json"), time.time() - 3600
    os.utime(measured, (hour_ago, hour_ago))
    assert redone(study, folder, calls) == ["evaluate"]


def test_two_studies_do_not_work_on_one_fold_at_a_time(prepared, folder, calls, monkeypatch):
    study, other = small(), folder.with_name("other")
    run = study.runs()[0]
    seen, call = [], running.run_command

    def call_meanwhile(command, *arguments, **keywords):
        if "nnUNetv2" in command[0]:
            seen.append((state_of(run, study, other, "cpu").kind, execute(run, study, other, "cpu")))
        return call(command, *arguments, **keywords)

    monkeypatch.setattr(running, "run_command", call_meanwhile)
    assert execute(run, study, folder, "cpu") == "finished"
    assert seen == [("running", "left to another runner")] * 2
    assert len(calls()) == 4
    (lock,) = prepared.glob("Dataset501_ATLASv2/*/.fold_0.lock")
    lock.unlink()
    lock.mkdir()  # as good as one that belongs to somebody else
    assert execute(run, study, other, "cpu") == "finished"
    assert [line.split()[0] for line in calls()] == ["nnssl_evaluate"] * 2, "models are shared, evaluations are not"


def test_a_fold_that_was_trained_by_hand_counts(prepared, folder, calls):
    study = small()
    by_hand = prepared / "Dataset501_ATLASv2" / "nnUNetTrainerMCLMIM__nnUNetSSLPlans__3d_fullres" / "fold_0"
    (by_hand / "validation").mkdir(parents=True)
    (by_hand / "checkpoint_final.pth").touch()
    (by_hand / "validation" / "summary.json").touch()
    execute(study.runs()[1], study, folder, "cpu")
    assert [line.split()[0] for line in calls()] == ["nnssl_evaluate", "nnUNetv2_predict", "nnssl_evaluate"]


def test_an_interrupted_training_is_continued_and_an_interrupted_prediction_begun_anew(prepared, folder, calls):
    study = small()
    fold = prepared / "Dataset501_ATLASv2" / "nnUNetTrainerMCLMIM__nnUNetSSLPlans__3d_fullres" / "fold_0"
    (fold / "test.unfinished").mkdir(parents=True)
    (fold / "test.unfinished" / "torn.nii.gz").touch()
    (fold / "checkpoint_latest.pth").touch()
    execute(study.runs()[1], study, folder, "cpu")
    assert calls()[0].split(" settings")[0].endswith("-device cpu --c")
    assert [path.name for path in (fold / "test").iterdir()] == ["case.nii.gz"]
    assert not (fold / "test.unfinished").exists()


def test_a_failed_run_is_recorded_with_its_log_stops_no_other_and_is_tried_again(folder, calls, monkeypatch):
    study = small()
    first = study.runs()[0]
    monkeypatch.setenv("FAKE_FAILS", "nnUNetv2_predict*Scratch*-p nnUNetSSLPlans -device*")
    assert execute_all(study.runs(), study, folder, "cpu") == [first.id]
    assert kinds(study, folder) == ["failed", "finished", "finished", "finished"]
    state = state_of(first, study, folder, "cpu")
    assert "predict: status 3: out of memory" in state.detail
    assert str(log_of(folder, first)) in state.detail
    assert "$ nnUNetv2_predict" in log_of(folder, first).read_text()
    calls()
    monkeypatch.delenv("FAKE_FAILS")
    assert execute_all(study.runs(), study, folder, "cpu") == []
    assert [line.split()[0] for line in calls()] == ["nnUNetv2_predict", "nnssl_evaluate"]
    assert (read_record(folder, first)["state"], kinds(study, folder)) == ("finished", ["finished"] * 4)


def test_a_command_that_ends_well_and_leaves_nothing_has_failed(folder, programs, monkeypatch):
    study = small()
    monkeypatch.setenv("FAKE_FORGETS", "nnUNetv2_train*")
    assert execute(study.runs()[0], study, folder, "cpu") == "failed"
    assert "left no" in read_record(folder, study.runs()[0])["reason"]


def test_a_program_that_is_not_there_is_a_failure_of_the_run(folder, programs):
    study = small()
    (programs / "nnUNetv2_train").unlink()
    assert execute(study.runs()[0], study, folder, "cpu") == "failed"
    assert "No such file" in read_record(folder, study.runs()[0])["reason"]


def test_an_arm_that_names_its_checkpoint_keeps_its_models_in_the_study(tmp_path, prepared, folder, calls):
    checkpoint = tmp_path / "other.safetensors"
    checkpoint.touch()
    arms = {"other": {"trainer": "nnUNetTrainerMCLMIM", "checkpoint": str(checkpoint)}}
    study = small(arms=arms)
    assert execute_all(study.runs(), study, folder, "cpu") == []
    assert f"checkpoint={checkpoint}" in calls()[0]
    assert (folder / "models" / "other" / "Dataset501_ATLASv2").is_dir()
    assert not (prepared / "Dataset501_ATLASv2").exists()


def test_what_cannot_begin_yet_says_what_it_waits_for(nnunet_folders, prepared, folder):
    study = small()
    preprocessed = nnunet_folders["nnUNet_preprocessed"] / "Dataset501_ATLASv2"
    shutil.rmtree(prepared / "Dataset500_FOMO60K")
    assert kinds(study, folder) == ["missing", "waiting", "missing", "waiting"]
    assert "MCL+MIM has no checkpoint: pre-train one (nnssl_pretrain -c mcl_mim)" in details(study, folder)[1]
    shutil.rmtree(preprocessed / "nnUNetSSLPlans_3d_fullres")
    assert "planned and not preprocessed" in details(study, folder)[0]
    (preprocessed / "nnUNetSSLPlans.json").rename(preprocessed / "nnsslPlans.json")
    assert "Prepare it: nnssl_plan -d 501, or say plans: nnsslPlans, as" in details(study, folder)[0]
    (preprocessed / "nnsslPlans.json").unlink()
    assert details(study, folder)[0].endswith("Prepare it: nnssl_plan -d 501")
    shutil.rmtree(nnunet_folders["nnUNet_raw"] / "Dataset501_ATLASv2")
    assert "There is no data set 501" in details(study, folder)[0]


@pytest.mark.parametrize(
    ("plans", "command"),
    [
        ("nnUNetPlans", "nnUNetv2_plan_and_preprocess -d 501"),
        ("nnUNetSSLPlans", "nnssl_plan -d 501"),
        ("nnUNetResEncUNetMPlans", "nnUNetv2_plan_and_preprocess -d 501 -pl nnUNetPlannerResEncM"),
        ("nnUNetResEncUNetXLPlans", "nnUNetv2_plan_and_preprocess -d 501 -pl nnUNetPlannerResEncXL"),
    ],
)
def test_the_command_that_is_advised_makes_the_plans_that_are_missing(nnunet_folders, prepared, folder, plans, command):
    study = dataclasses.replace(small(), plans=plans)
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset501_ATLASv2" / f"{plans}.json").unlink(missing_ok=True)
    assert details(study, folder)[0].endswith(f"Prepare it: {command}")
    if "-pl" in command:
        planner = recursive_find_python_class(
            str(Path(nnunetv2.__path__[0], "experiment_planning")), command.split()[-1], "nnunetv2.experiment_planning"
        )
        assert inspect.signature(planner).parameters["plans_name"].default == plans


def details(study, folder):
    return [state_of(run, study, folder, "cpu").detail for run in study.runs()]


def test_a_trainer_of_another_package_takes_no_settings(folder, calls):
    study = small(arms={"stock": {"trainer": "nnUNetTrainer"}})
    assert kinds(study, folder) == ["missing", "waiting"]
    assert "nnUNetTrainer is not a trainer of nnunet_ssl: it would ignore 'fraction=50'" in details(study, folder)[1]
    arms = {"stock": {"trainer": "nnUNetTrainer"}, "ours": {"trainer": "nnUNetTrainerSwinFPNScratch"}}
    with_settings = small(arms=arms, settings="steps=250")
    assert "would ignore 'steps=250'" in details(with_settings, folder)[0]
    arms["stock"]["settings"] = None
    assert [run.settings for run in small(arms=arms, settings="steps=250").runs()[:2]] == ["", "steps=250"]
    assert execute(study.runs()[0], study, folder, "cpu") == "finished"


def start_runner(tmp_path, programs, folder):
    """Another process that executes the study's first run, whose training hangs; returns when it hangs."""
    (tmp_path / "small.yaml").write_text(STUDY)
    script = f"""
        import signal
        from pathlib import Path
        from nnunet_ssl import commands
        from nnunet_ssl.studies import running
        from nnunet_ssl.studies.study_file import read_study
        from nnunet_ssl.studies.cli import _interrupt
        signal.signal(signal.SIGTERM, _interrupt)
        commands.find_program = lambda name: {str(programs)!r} + "/" + name
        study = read_study({str(tmp_path / "small.yaml")!r})
        running.execute(study.runs()[0], study, Path({str(folder)!r}), "cpu")
    """
    environment = os.environ | {"FAKE_HANGS": "nnUNetv2_train*"}
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    until(lambda: (tmp_path / "calls").is_file())
    return runner


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_runners_do_nothing_twice_and_a_dead_runners_training_keeps_its_lock(tmp_path, programs, folder, calls):
    study = small()
    run = study.runs()[0]
    runner = start_runner(tmp_path, programs, folder)
    assert state_of(run, study, folder, "cpu").kind == "running"
    assert execute(run, study, folder, "cpu") == "left to another runner"
    runner.kill()
    runner.wait()
    assert state_of(run, study, folder, "cpu").kind == "running", "the training itself still runs"
    (training,) = processes_with(folder / "runs" / f"{run.id}.lock")
    os.killpg(training, signal.SIGKILL)
    until(lambda: state_of(run, study, folder, "cpu").kind == "missing")
    calls()
    assert execute(run, study, folder, "cpu") == "finished"


@pytest.mark.slow
def test_a_runner_that_is_told_to_stop_takes_its_training_with_it(tmp_path, programs, folder):
    study = small()
    run = study.runs()[0]
    runner = start_runner(tmp_path, programs, folder)
    runner.terminate()
    assert runner.wait(60) != 0
    assert state_of(run, study, folder, "cpu").kind == "missing"
    assert read_record(folder, run) == {}, "an interruption is no failure"


def processes_with(path):
    """Process groups that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == path:
                found.add(os.getpgid(int(link.parts[2])))
        except OSError:
            continue
    return found


def test_the_command_runs_reports_and_explains(tmp_path, folder, calls, monkeypatch, capsys):
    monkeypatch.setenv("nnssl_settings", "steps=1")
    monkeypatch.setenv("FAKE_FAILS", "nnUNetv2_train*MCLMIM*")
    call(monkeypatch, tmp_path, "run", "-device", "cpu", "--dry_run")
    printed = capsys.readouterr().out
    assert "nnssl_settings=fraction=50 nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMCLMIM" in printed
    assert calls() == []
    with pytest.raises(SystemExit, match="error: 2 runs failed: atlas__mcl_mim__fraction100__seed0__fold0, "):
        call(monkeypatch, tmp_path, "run", "-device", "cpu")
    assert not any("steps=1" in line for line in calls())
    call(monkeypatch, tmp_path, "status", "-device", "cpu")
    printed = capsys.readouterr().out
    assert "4 runs: 2 finished, 2 failed" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("MCL+MIM")] == [
        ["MCL+MIM", "0/1", "F", "0/1", "F"]
    ]
    assert "out of memory" in printed


def test_the_command_says_what_waits_and_exits_with_an_error(tmp_path, prepared, folder, calls, monkeypatch, capsys):
    shutil.rmtree(prepared / "Dataset500_FOMO60K")
    with pytest.raises(SystemExit, match="error: 2 runs wait for what is said above"):
        call(monkeypatch, tmp_path, "run", "-device", "cpu")
    assert "waiting: atlas__mcl_mim__fraction100__seed0__fold0 and 1 more: The arm MCL+MIM" in capsys.readouterr().out
    assert kinds(small(), folder) == ["finished", "waiting", "finished", "waiting"]


def test_alignment_runs_measure_the_arms_pre_trainings(nnunet_folders, prepared, folder, calls):
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K").mkdir()
    experiment = {"kind": "alignment", "arms": ["mcl_mim"]}
    study = small(experiments={"alignment": experiment})
    assert execute_all(study.runs(), study, folder, "cpu") == []
    encoder = prepared / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    assert f"alignment --checkpoint {encoder} -d 500 --subjects validation -device cpu" in calls()[0]


def test_repeats_of_a_fine_tuning_on_scans_are_repeats_also_from_random_weights(
    tmp_path, nnunet_folders, prepared, folder
):
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K").mkdir()
    encoder = tmp_path / "encoder.safetensors"
    encoder.touch()
    for trainer in ("nnUNetTrainerSwinFPNScratch", "nnUNetTrainerSSL"):
        arms = {"one": {"trainer": trainer, "checkpoint": str(encoder)}}
        experiment = {"kind": "finetune", "options": "--target age", "seeds": [0, 1, 2]}
        study = small(arms=arms, experiments={"one": experiment})
        called = [list(stages_of(run, study, folder, "cpu")[0].command) for run in study.runs()]
        assert [one[one.index("500") + 1 : one.index("--target")] for one in called] == [
            [],
            ["--seed", "1"],
            ["--seed", "2"],
        ]


@pytest.mark.parametrize("kind", ["alignment", "probe"])
@pytest.mark.parametrize("start", [{"trainer": "nnUNetTrainerMCLMIM"}, {"checkpoint": "encoder.safetensors"}])
def test_one_encoder_is_measured_once_and_its_figures_are_no_repeats(kind, start, folder):
    arms = {"there": start, "own": {"recipe": "mcl"}}
    study = small(arms=arms, experiments={"one": {"kind": kind, "options": "--target age", "seeds": [0, 1, 2]}})
    measured = [(run.arm, run.seed) for run in study.runs() if isinstance(run, Measurement)]
    assert measured == [("there", 0), ("own", 0), ("own", 1), ("own", 2)]
    for run in study.runs():
        if isinstance(run, Measurement):
            out = results_of(run, folder)
            out.mkdir(parents=True)
            (out / "probe.json").write_text(json.dumps({"scores": {"R2": {"value": 0.5 + 0.1 * run.seed}}}))
    if kind == "probe":
        figures = read_figures(study, study.experiments["one"], folder)
        summary = summarize_figures(figures).set_index("arm")
        assert summary["n_seeds"].to_dict() == {"there": 1, "own": 3}
        assert np.isnan(summary["low"]["there"]), "of one encoder there is no spread to be had"
        assert len(compare_figures(study.experiments["one"], figures)) == 0


def test_an_arm_from_random_weights_is_not_measured_as_the_encoder_whose_architecture_it_takes(
    nnunet_folders, prepared, folder
):
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K").mkdir()
    encoder = prepared / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    arms = {"scratch": {"trainer": "nnUNetTrainerSwinFPNScratch", "checkpoint": str(encoder)}}
    for kind in ("alignment", "probe"):
        study = small(arms=arms, experiments={"one": {"kind": kind, "options": "--target age"}})
        state = state_of(study.runs()[0], study, folder, "cpu")
        assert state.kind == "waiting" and "scratch starts from random weights" in state.detail


SBATCH = """#!/bin/sh
# Starts the tasks of a job array here, one after another, unless $FAKE_QUEUE holds them back.
for script; do :; done
cp "$script" "$FAKE_QUEUE.script"
echo "Submitted batch job 7"
[ -s "$FAKE_QUEUE" ] && exit
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0
export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
(for SLURM_ARRAY_TASK_ID in $(seq 0 "$last"); do
    export SLURM_ARRAY_TASK_ID
    sh "$FAKE_QUEUE.script"
done) > "$FAKE_QUEUE.output" 2>&1 &
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done
exec "$@"
"""
SLURM = "slurm: {partition: gpu, time: 60, gpus_per_node: 1}\n"
SITE = """
from nnunet_ssl import commands
commands.find_program = lambda name: f"{programs}/{{name}}"
"""


@pytest.fixture
def slurm(tmp_path, programs, monkeypatch):
    """A SLURM whose jobs run here, with the fake programs; the file that lists its queue."""
    pytest.importorskip("submitit")
    queue = tmp_path / "queue"
    queue.touch()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("squeue", '#!/bin/sh\ncat "$FAKE_QUEUE"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "sitecustomize.py").write_text(SITE.format(programs=programs))
    monkeypatch.setenv("FAKE_QUEUE", str(queue))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(programs))
    return queue


def test_what_is_queued_is_not_submitted_again(tmp_path, folder, slurm, monkeypatch, capsys):
    slurm.write_text("7_0\n7_1\n7_2\n7_3\n")
    arguments = ("run", "-device", "cpu", "--executor", "slurm")
    call(monkeypatch, tmp_path, *arguments, text=STUDY + SLURM)
    assert "Submitted 4 jobs, 7_0 to 7_3" in capsys.readouterr().out
    script = slurm.with_suffix(".script").read_text()
    for option in ("--partition=gpu", "--time=60", "--gpus-per-node=1", "--job-name=small", "--array=0-3"):
        assert f"#SBATCH {option}" in script
    slurm.write_text("7_0\n7_3\n")
    call(monkeypatch, tmp_path, "status", "-device", "cpu", text=STUDY + SLURM)
    assert "4 runs: 2 queued, 2 missing" in capsys.readouterr().out
    call(monkeypatch, tmp_path, *arguments, text=STUDY + SLURM)
    assert "Submitted 2 jobs" in capsys.readouterr().out


def test_options_that_slurm_does_not_have_are_refused(tmp_path, folder, slurm, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: SLURM refuses the job .*'gpus': 1"):
        call(monkeypatch, tmp_path, "run", "--executor", "slurm", "-device", "cpu", text=STUDY + "slurm: {gpus: 1}\n")


@pytest.mark.slow
def test_a_slurm_job_does_one_run(tmp_path, folder, slurm, calls, monkeypatch):
    text = STUDY.replace("[100, 50]", "[50]") + SLURM
    call(monkeypatch, tmp_path, "run", "-device", "cpu", "--executor", "slurm", text=text)
    study = study_from(yaml.safe_load(text))
    until(lambda: {read_record(folder, run)["state"] for run in study.runs()} == {"finished"}, seconds=240)
    assert kinds(study, folder) == ["finished"] * 2
    assert len(calls()) == 2 * 4


def test_without_slurm_the_command_says_so(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="error: --executor slurm: there is no sbatch here"):
        call(monkeypatch, tmp_path, "run", "--executor", "slurm", "-device", "cpu")


MAKING = """
name: making
synthetic: {corpus: [maker a, maker $work/b]}
pretraining: batch_size=4 steps=20
arms:
  mcl: {recipe: mcl}
  same: {recipe: mcl, trainer: nnUNetTrainerMCL}
  warm: {recipe: mcl, pretraining: contrastive.temperature=0.5 steps=30}
experiments:
  age: {kind: probe, options: --target age, seeds: [0, 1]}
  course: {kind: pretraining, metrics: [validation/error/t1], seeds: [0, 1]}
"""


@pytest.fixture
def making(tmp_path, nnunet_folders, programs, monkeypatch):
    """Runs nnssl_study on MAKING, with a further word or two; the folder of the study."""

    def run(action, *words, text=MAKING):
        with monkeypatch.context() as patch:  # a study that makes its data sets nnU-Net's folders for its process
            for name, path in nnunet_folders.items():
                patch.setenv(name, str(path))
            call(patch, tmp_path, action, "-device", "cpu", *words, text=text)
        return nnunet_folders["nnUNet_results"] / "studies" / "making"

    return run


def test_a_study_makes_its_data_then_pre_trains_every_arm_and_seed_then_measures(making, calls, capsys):
    folder = making("run")
    made = calls()
    assert made[:2] == ["maker a settings= checkpoint=", f"maker {folder}/work/b settings= checkpoint="]
    pretrained = [line for line in made if line.startswith("nnssl_pretrain")]
    assert len(pretrained) == 4, "two arms share theirs"
    assert "-c mcl -d 500 -device cpu --set recipe=mcl_seed0 seed=0 batch_size=4 steps=20" in pretrained[0]
    assert "recipe=warm_seed1 seed=1 batch_size=4 steps=30 contrastive.temperature=0.5" in pretrained[3]
    measured = [line for line in made if line.startswith("nnssl_evaluate")]
    assert len(measured) == 6
    encoder = folder / "pretrained" / "Dataset500_Made" / "warm_seed1" / "encoder.safetensors"
    assert f"nnssl_evaluate probe --checkpoint {encoder} -d 500 --target age -device cpu" in measured[-1]
    capsys.readouterr()
    making("run")
    assert calls() == [], "nothing is made twice"
    assert "11 finished. Tables and figures: nnssl_study collect " in capsys.readouterr().out


def test_what_was_made_by_halves_is_made_from_there(making, calls, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "maker*/b*")
    with pytest.raises(SystemExit, match="1 runs failed: make__corpus"):
        making("run")
    calls()
    monkeypatch.delenv("FAKE_FAILS")
    making("run")
    assert [line.split()[1] for line in calls() if line.startswith("maker")] == [
        str(folder_of("nnUNet_results") / "studies" / "making" / "work" / "b")
    ]


def test_nothing_begins_on_data_that_are_half_made(making, calls, monkeypatch):
    """The folder is there from the first command on."""
    (folder_of("nnUNet_preprocessed") / "Dataset500_Made").mkdir()
    monkeypatch.setenv("FAKE_FAILS", "maker*/b*")
    with pytest.raises(SystemExit, match="1 runs failed: make__corpus"):
        making("run")
    assert [line.split()[0] for line in calls()] == ["maker", "maker"]
    with pytest.raises(SystemExit, match="1 runs failed"):
        making("run", text=MAKING.replace("corpus: [maker", "other: [maker c], corpus: [maker"))
    assert {line.split()[0] for line in calls()} == {"maker"}, (
        "the other data set is none of theirs, for all one can tell"
    )


def test_data_are_made_one_after_another_by_however_many_runners(making, calls, nnunet_folders):
    """Later data may need earlier ones, as preprocessing needs what was converted."""
    text = MAKING.replace("maker $work/b]}", "maker $work/b], plans: [maker plans]}")
    study, folder = study_from(yaml.safe_load(text)), nnunet_folders["nnUNet_results"] / "studies" / "making"
    corpus, plans = study.makings
    with running._locked(folder / "runs" / f"{corpus.id}.lock"):  # another runner
        states = [state_of(run, study, folder, "cpu") for run in study.runs()]
        assert [state.kind for state in states] == ["running", *["waiting"] * 11]
        assert {state.detail for state in states[1:]} == {"The data are made first: make__corpus."}
    making("run", text=text)
    assert [line.split()[1] for line in calls() if line.startswith("maker")][-1] == plans.name


def test_looking_at_a_study_that_makes_its_data_leaves_nothing(making, nnunet_folders):
    folder = making("status")
    making("run", "--dry_run")
    assert not folder.exists() and not list(nnunet_folders["nnUNet_preprocessed"].iterdir())


def test_the_users_own_folders_are_not_touched_by_a_study_that_makes_its_data(making, nnunet_folders):
    making("run")
    assert not list(nnunet_folders["nnUNet_preprocessed"].iterdir())
    assert [path.name for path in nnunet_folders["nnUNet_results"].iterdir()] == ["studies"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("maker a,", "maker a -n 2,"),
        ("[maker a, ", "[maker c, maker a, "),
        ("maker $work/b", "maker $work/c"),
    ],
)
def test_a_study_whose_data_were_made_otherwise_is_refused(making, calls, before, after):
    making("run")
    calls()
    for action in ("run", "status", "collect"):
        with pytest.raises(SystemExit, match=r"synthetic\.corpus was made by 'maker .*another folder"):
            making(action, text=MAKING.replace(before, after))
    assert calls() == []
    making("run", text=MAKING.replace("$work/b]", "$work/b, maker more]"))
    assert [line.split()[1] for line in calls()] == ["more"], "what comes after is no other way to make what is there"


def test_marks_without_a_command_count(making, calls):
    folder = making("run")
    for mark in (folder / "made").iterdir():
        mark.write_text("")
    calls()
    making("run", text=MAKING.replace("maker a", "maker c"))
    assert calls() == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("batch_size=4 steps=20", "batch_size=2 steps=20", "mcl_seed0 .*: batch_size "),
        ("temperature=0.5", "temperature=0.7", "warm_seed0 .*: contrastive "),
        ("{recipe: mcl, pretraining", "{recipe: cl, pretraining", "warm_seed0 .*: contrastive "),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_study_whose_encoders_were_pre_trained_otherwise_is_refused(making, calls, before, after, message, finished):
    folder = making("run")
    for run in study_from(yaml.safe_load(MAKING)).runs():
        if isinstance(run, Pretraining):
            config = load_config(run.recipe, list(run.overrides)).as_yaml()
            (pretrained(run, folder) / "config.yaml").write_text(config)
            if not finished:
                (pretrained(run, folder) / "encoder.safetensors").rename(pretrained(run, folder) / "checkpoint_1.pth")
    calls()
    for action in ("run", "status", "collect"):
        with pytest.raises(SystemExit, match=f"The pre-training {message}.*another folder"):
            making(action, text=MAKING.replace(before, after))
    assert calls() == []
    making("status", text=MAKING.replace("batch_size=4", "batch_size=4 workers=3"))


def test_other_options_of_a_measurement_are_another_one_and_another_checkpoint_is_measured_anew(
    tmp_path, nnunet_folders, prepared, folder, calls
):
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K").mkdir()
    (nnunet_folders["nnUNet_preprocessed"] / "Dataset600_Other").mkdir()
    encoders = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for encoder in encoders:
        encoder.touch()
        os.utime(encoder, (0, 0))

    def measured(encoder, **experiment):
        arms = {"one": {"trainer": "nnUNetTrainerMCLMIM", "checkpoint": str(encoder)}}
        study = small(arms=arms, experiments={"one": {"kind": "alignment", **experiment}})
        (before,) = (state_of(run, study, folder, "cpu").kind for run in study.runs())
        assert execute_all(study.runs(), study, folder, "cpu") == []
        assert kinds(study, folder) == ["finished"]
        return before, len(calls())

    assert measured(encoders[0]) == ("missing", 1)
    assert measured(encoders[0]) == ("finished", 0)
    assert measured(encoders[0], options="--scans all") == ("missing", 1)
    assert measured(encoders[1]) == ("outdated", 1)
    for corpus in (500, 600):
        assert measured(encoders[0], kind="probe", options="--target age", corpus=corpus) == ("missing", 1)


def test_scores_are_of_the_settings_that_the_study_has_now_even_if_it_had_them_before(prepared, folder, calls):
    """Both trainings are there and older than the scores of the other one."""
    first, second = small(settings="steps=250"), small(settings="steps=500")
    for study in (first, second):
        execute(study.runs()[0], study, folder, "cpu")
    calls()
    assert kinds(first, folder)[0] == "outdated"
    assert redone(first, folder, calls) == ["evaluate", "evaluate"]
    other_preset = small(settings="steps=250", datasets={"atlas": {"id": 501, "preset": "isles"}})
    assert redone(other_preset, folder, calls) == ["evaluate", "evaluate"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_models_that_started_from_another_encoder_are_not_taken_for_the_arms(
    tmp_path, prepared, folder, calls, monkeypatch, interrupted
):
    for name in ("first", "second"):
        (tmp_path / f"{name}.safetensors").touch()
    if interrupted:
        monkeypatch.setenv("FAKE_FAILS", "nnUNetv2_train*")

    def text(name):
        arm = f"{{trainer: nnUNetTrainerMCLMIM, checkpoint: {tmp_path}/{name}.safetensors}}"
        return STUDY.replace("{label: MCL+MIM, trainer: nnUNetTrainerMCLMIM}", arm)

    with pytest.raises(SystemExit, match="4 runs failed") if interrupted else contextlib.nullcontext():
        call(monkeypatch, tmp_path, "run", "-device", "cpu", text=text("first"))
    calls()
    for action in ("run", "status", "collect"):
        with pytest.raises(SystemExit, match=r"models of mcl_mim start from .*first\.safetensors, and now .*second"):
            call(monkeypatch, tmp_path, action, "-device", "cpu", text=text("second"))
    assert "waiting" in kinds(study_from(yaml.safe_load(text("second"))), folder)
    assert calls() == []


def test_models_from_a_shared_pre_training_are_not_taken_for_those_of_an_arms_own(folder):
    note = folder / "models" / "same" / NOTE
    note.parent.mkdir(parents=True)
    note.write_text("the pre-training of mcl")
    refuse_changes(study_from(yaml.safe_load(MAKING)), folder)
    with pytest.raises(UserError, match=r"start from the pre-training of mcl, and now .* the pre-training of same"):
        refuse_changes(study_from(yaml.safe_load(MAKING.replace("{recipe: mcl, t", OWN))), folder)


def test_outdated_scores_are_not_collected_and_gone_when_they_cannot_be_made_anew(
    tmp_path, prepared, folder, calls, monkeypatch
):
    text = STUDY.replace("[100, 50]", "[100]")
    call(monkeypatch, tmp_path, "run", "-device", "cpu", text=text)
    changed = text.replace("preset: atlas", "preset: isles")
    with pytest.raises(SystemExit, match="The results of 2 runs are of what the study was before"):
        call(monkeypatch, tmp_path, "collect", "-device", "cpu", text=changed)
    monkeypatch.setenv("FAKE_FAILS", "nnssl_evaluate*")
    with pytest.raises(SystemExit, match="2 runs failed"):
        call(monkeypatch, tmp_path, "run", "-device", "cpu", text=changed)
    assert list(folder.rglob("lesions.json")) == []


def test_commands_on_a_cpu_keep_their_memory_and_share_the_cores(making, calls, tmp_path, monkeypatch, programs):
    for name in ("MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "7")
    seen = f'echo "$OMP_WAIT_POLICY $MALLOC_TRIM_THRESHOLD_ $MALLOC_MMAP_THRESHOLD_" > {tmp_path}/seen'
    (programs / "maker").write_text(f"#!/bin/sh\n{seen}\n{PROGRAMS.read_text()}")
    making("run")
    assert (tmp_path / "seen").read_text() == f"PASSIVE {2**34} 7\n", "what a user has set stays"


def test_figures_are_collected_over_seeds_and_arms_compared_seed_by_seed(making, calls, capsys):
    making("run")
    making("collect")
    report = capsys.readouterr().out
    assert "| arm | R2 |" in report and "0.5 [0.5, 0.5]" in report
    assert "| arm | validation/error/t1 |" in report and "| warm | 0.4 [0.4, 0.4] |" in report
    assert "warm - mcl | R2 | +0 [+0, +0] | 1 | 1" in report
    assert "synthetic" in report
    assert "(age_intervals.png)" in report and "(course_intervals.png)" in report


def test_full_size_is_a_study_of_its_own_on_the_users_data(making, calls, monkeypatch):
    full = MAKING + "full: {synthetic: null, pretraining: steps=40, experiments: {course: null}}\n"
    with pytest.raises(SystemExit, match="10 runs wait"):
        making("run", "--full", text=full)
    assert calls() == [], "there is no corpus"
    (folder_of("nnUNet_preprocessed") / "Dataset500_FOMO60K").mkdir()
    making("run", "--full", text=full)
    assert "--set recipe=mcl_seed0 seed=0 steps=40" in calls()[0]
    assert (folder_of("nnUNet_results") / "studies" / "making_full" / "pretrained" / "Dataset500_FOMO60K").is_dir()
    with pytest.raises(SystemExit, match="no key 'full'"):
        making("run", "--full")


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_runner_waits_for_what_the_first_one_makes(making, nnunet_folders, calls, monkeypatch, killed):
    """Also where the first one had begun before the second one was called."""
    monkeypatch.setattr(running, "PAUSE_S", 0.1)
    study = study_from(yaml.safe_load(MAKING))
    folder = nnunet_folders["nnUNet_results"] / "studies" / "making"
    (first,) = (run for run in study.runs() if run.id.startswith("make"))
    begun, waits, real = threading.Event(), threading.Event(), running.time.sleep

    def first_runner():
        with running._locked(folder / "runs" / f"{first.id}.lock"):
            begun.set()
            assert waits.wait(60)
            for stage in () if killed else stages_of(first, study, folder, "cpu"):
                assert running._run_stage(stage, log_of(folder, first), ()) is None

    def pause(seconds):
        waits.set()
        real(seconds)

    monkeypatch.setattr(running.time, "sleep", pause)
    thread = threading.Thread(target=first_runner)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(SystemExit, match="10 runs wait") if killed else contextlib.nullcontext():
        making("run")
    thread.join()
    assert len([line for line in calls() if line.startswith("nnssl_pretrain")]) == (0 if killed else 4)


OWN = "{recipe: mcl, pretraining: queue_size=64, t"

TESTED = """
name: tested
arms: {one: {trainer: nnUNetTrainerSwinFPNScratch, checkpoint: ENCODER}}
datasets:
  atlas: {label: ATLAS, id: 501, preset: atlas, tests: {others: held_out}}
  held_out: {id: 901}
experiments: {all: {datasets: [atlas]}}
prediction: --disable_tta
"""


def test_models_are_tried_on_the_data_sets_that_are_named_as_tests(prepared, folder, nnunet_folders, calls):
    raw = nnunet_folders["nnUNet_raw"] / "Dataset901_Others"
    (raw / "labelsTr").mkdir(parents=True)
    encoder = prepared / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    study = study_from(yaml.safe_load(TESTED.replace("ENCODER", str(encoder))) | {"plans": "nnUNetSSLPlans"})
    (run,) = study.runs()
    assert execute(run, study, folder, "cpu") == "finished"
    predicted, evaluated = calls()[-2:]
    assert f"nnUNetv2_predict -i {raw / 'imagesTr'}" in predicted and "--disable_tta" in predicted
    assert f"-ref {raw / 'labelsTr'}" in evaluated and f"-o {folder}/results/{run.id}/others" in evaluated


def test_predictions_with_other_options_or_of_other_data_are_not_taken_for_ones_own(
    prepared, folder, nnunet_folders, calls
):
    for name in ("Dataset901_Others", "Dataset902_More"):
        (nnunet_folders["nnUNet_raw"] / name / "labelsTr").mkdir(parents=True)
    values = yaml.safe_load(TESTED.replace(", checkpoint: ENCODER", "")) | {"plans": "nnUNetSSLPlans"}
    values["datasets"]["more"] = {"id": 902}
    other_data = values["datasets"] | {"atlas": values["datasets"]["atlas"] | {"tests": {"others": "more"}}}
    for changes, n_predicted in (({}, 2), ({"prediction": ""}, 2), ({"datasets": other_data}, 1)):
        study = study_from(values | changes)
        for where in (folder, folder.with_name("another")):
            assert execute_all(study.runs(), study, where, "cpu") == []
        predicted = [line for line in calls() if line.startswith("nnUNetv2_predict")]
        assert len(predicted) == n_predicted, "once, for both studies"
