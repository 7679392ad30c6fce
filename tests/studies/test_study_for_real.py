"""A small study from beginning to end: synthetic brains, and the real programs as a user calls them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).resolve().parents[2] / "dataset_conversion" / "Dataset501_ATLASv2.py"
STUDY = """
name: small
settings: steps=4,epoch_steps=4,patch_size=32x40x40,batch_size=2
arms:
  scratch: {trainer: nnUNetTrainerSwinFPNScratch, checkpoint: ENCODER}
  mcl_mim: {label: MCL+MIM, trainer: nnUNetTrainerMCLMIM}
datasets:
  atlas: {label: ATLAS, id: 501, preset: atlas}
experiments:
  fractions: {title: By fraction, datasets: [atlas], fractions: [100, 50]}
"""
TESTED = """
name: tested
settings: steps=4,epoch_steps=4,patch_size=32x40x40,batch_size=2
arms:
  mcl_mim: {label: MCL+MIM, trainer: nnUNetTrainerMCLMIM}
datasets:
  atlas: {label: ATLAS, id: 501, preset: atlas}
experiments:
  half: {datasets: [atlas], fractions: [50]}
"""


@pytest.fixture
def call(nnunet_folders):
    """A function that runs a program, or a script, and returns what it printed."""

    def run(program, *arguments, **variables):
        command = [sys.executable if program == "python" else str(BIN / program), *map(str, arguments)]
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads would starve busy ones
        environment = os.environ | threads | {"nnUNet_def_n_proc": "1", "nnUNet_compile": "f"} | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_two_arms_and_two_fractions_through_nnunets_own_commands(tmp_path, nnunet_folders, write_tiny_encoder, call):
    atlas, truth = tmp_path / "ATLAS_2", tmp_path / "truth"
    size = ("-n", 10, "--n_test", 2, "--voxel_mm", 6)
    call("python", "-m", "nnunet_ssl.phantom", "atlas", atlas, *size, "--truth", truth)
    call("python", SCRIPT, "-i", atlas, "-np", 1)
    call("nnUNetv2_plan_and_preprocess", "-d", 501, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    results = nnunet_folders["nnUNet_results"]
    encoder = results / "Dataset500_FOMO60K" / "mcl_mim" / "encoder.safetensors"
    write_tiny_encoder(encoder)
    study = tmp_path / "small.yaml"
    study.write_text(STUDY.replace("ENCODER", str(encoder)))

    here = {"nnUNet_n_proc_DA": "0"}
    call("nnssl_study", "run", study, "-device", "cpu", **here)
    report = call("nnssl_study", "collect", study, "-device", "cpu")
    assert "4 of 4 runs are finished" in report
    folder = results / "studies" / "small" / "report"
    cases = pd.read_csv(folder / "cases.csv")
    assert cases.groupby(["arm", "fraction"]).size().tolist() == [2] * 4  # a fifth of ten cases, each
    assert cases.groupby(["arm", "fraction"])["case"].agg(tuple).nunique() == 1, "all arms, the same cases"
    assert len(pd.read_csv(folder / "fractions_tests.csv")) == 2
    assert (folder / "fractions_fractions.png").is_file()
    log = (results / "studies" / "small" / "logs" / "atlas__mcl_mim__fraction50__seed0__fold0.log").read_text()
    assert "Training on 4 of 8 cases (50 %)" in log
    assert str(encoder) in log

    before = {path: path.stat().st_mtime_ns for path in results.rglob("checkpoint_final.pth")}
    assert len(before) == 4
    shutil.copytree(truth, nnunet_folders["nnUNet_raw"] / "Dataset501_ATLASv2" / "labelsTs")
    tested = tmp_path / "tested.yaml"
    tested.write_text(TESTED)
    call("nnssl_study", "run", tested, "-device", "cpu", **here)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("checkpoint_final.pth")} == before
    report = call("nnssl_study", "collect", tested, "-device", "cpu")
    assert "ATLAS (test set): 2 cases, 1 run(s) per arm" in report
    assert "ATLAS: 2 cases, 1 run(s) per arm" in report


OWN = """
name: own
synthetic:
  corpus:
    - python -m nnunet_ssl.phantom fomo $work/fomo -n 8 --voxel_mm 6 --modalities t1 flair --clean
    - python -m nnunet_ssl.conversion.fomo60k -i $work/fomo
    - nnssl_prepare -d 500 -np 1 --spacing 6 6 6
  tissue:
    - python -m nnunet_ssl.phantom tissue $nnUNet_raw/Dataset541_T1 -n 5 --n_test 0 --voxel_mm 6 --modalities t1
    - python -m nnunet_ssl.phantom tissue $nnUNet_raw/Dataset942_FLAIR -n 2 --n_test 0 --voxel_mm 6 --modalities flair
    - nnUNetv2_plan_and_preprocess -d 541 -c 3d_fullres -np 1 -npfp 1
pretraining: >-
  swin.embed_dim=8 swin.depths=1,1,1 swin.num_heads=1,2,2 swin.window_size=4 patch_size=24,24,24 batch_size=2
  queue_size=16 steps=8 workers=0 log_every=2 gradients_every=1 validation.every=8 validation.fraction=0.3
settings: steps=4,epoch_steps=4,patch_size=24x24x24,batch_size=2
arms:
  mcl_mim: {recipe: mcl_mim}
  equal: {recipe: mcl_mim, pretraining: balance=equal_norms}
datasets:
  t1: {id: 541, preset: classes, tests: {FLAIR: flair}}
  flair: {id: 942, preset: classes}
experiments:
  dominance: {kind: gradients, seeds: [0, 1]}
  course: {kind: pretraining, seeds: [0, 1], metrics: [validation/effective_rank]}
  tissue: {datasets: [t1], arms: [mcl_mim], metrics: [dice]}
  group: {kind: probe, arms: [mcl_mim], options: --target group --across}
"""


@pytest.mark.slow
def test_a_study_that_makes_its_own_brains_answers_from_the_scans_to_the_report(tmp_path, nnunet_folders, call):
    study = tmp_path / "own.yaml"
    study.write_text(OWN)
    call("nnssl_study", "run", study, "-device", "cpu", nnUNet_n_proc_DA="1")  # nnU-Net cannot preprocess with 0
    report = call("nnssl_study", "collect", study, "-device", "cpu")
    assert "8 of 8 runs are finished" in report and "synthetic" in report
    folder = nnunet_folders["nnUNet_results"] / "studies" / "own"
    gradients = pd.read_csv(folder / "report" / "dominance.csv")
    assert set(gradients["arm"]) == {"mcl_mim", "equal"} and set(gradients["n_runs"]) <= {1, 2}
    assert {"encoder", "embedding", "stage1"} <= set(gradients["depth"])
    assert {path.name for path in (folder / "report").glob("*.png")} >= {"dominance.png", "group_intervals.png"}
    encoders = [path.read_bytes() for path in sorted(folder.rglob("encoder.safetensors"))]
    assert len(encoders) == len(set(encoders)) == 4, "arms and seeds are pre-trained each by itself"
    tissue = pd.read_csv(folder / "report" / "tissue.csv")
    assert set(tissue["part"]) == {"validation", "FLAIR"} and tissue["mean"].between(0, 1).all()
    figures = pd.read_csv(folder / "report" / "group.csv")
    assert any(" to " in name for name in figures["figure"])
    assert not list(nnunet_folders["nnUNet_raw"].iterdir()), "the user's folders are left alone"
    study.write_text(OWN.replace("queue_size=16", "queue_size=24"))
    with pytest.raises(AssertionError, match="mcl_mim_seed0 has other settings than the study has now: queue_size"):
        call("nnssl_study", "status", study, "-device", "cpu")
