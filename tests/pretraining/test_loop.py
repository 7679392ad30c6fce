"""Whole trainings, tiny, in this process."""

import json
from types import SimpleNamespace

import blosc2
import numpy as np
import pandas as pd
import pytest
import torch

from nnunet_ssl import files
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import locked
from nnunet_ssl.pretraining import loop
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.optimization import build_optimizer
from nnunet_ssl.pretraining.run import outputs
from nnunet_ssl.pretraining.run.records import Records
from nnunet_ssl.pretraining.step import training_step
from nnunet_ssl.weights.encoders import load_encoder, read_checkpoint

RECIPES = ["cl", "mcl", "mim", "cl_mim", "mcl_mim", "mcl_mim_balanced", "mcl_ibot", "mcl_path", "mcl_dense"]


@pytest.fixture
def train_with_pictures(tiny, nnunet_folders):
    """A function that trains and returns the folder of results."""

    def run(recipe, *overrides, resume=False):
        config = load_config(recipe, [*tiny, *overrides])
        pretrain(config, 500, resume, torch.device("cpu"))
        return nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / config.recipe

    return run


@pytest.fixture
def train(train_with_pictures, monkeypatch):
    """The same without pictures, which take longer than these trainings."""
    monkeypatch.setattr(Records, "plot", lambda records: None)
    monkeypatch.setattr(Records, "picture", lambda *_: None)
    return train_with_pictures


def checkpoint(folder, name="checkpoint_latest.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_ends_with_an_encoder_that_others_can_load(write_prepared, train, recipe):
    write_prepared()
    folder = train(recipe, "steps=2")
    pretrained = read_checkpoint(folder / "encoder.safetensors")
    assert (pretrained.method, pretrained.step, pretrained.preprocessing) == (recipe, 2, {"spacing": [1.0, 1.0, 1.0]})
    assert load_encoder(build_encoder(pretrained.architecture), pretrained).fraction == 1
    assert pretrained.metadata["corpus"]["subjects"] == 8
    assert {"torch", "nnunetv2", "nnunet_ssl"} <= set(pretrained.metadata["versions"])
    assert any("2511.11311" in citation for citation in pretrained.metadata["citations"])

    final = checkpoint(folder, "checkpoint_final.pth")
    for name, tensor in pretrained.tensors.items():
        assert torch.equal(tensor, final["learner"][f"query.encoder.{name}"])
    decoder = {name: one for name, one in final["learner"].items() if name.startswith("query.decoder.")}
    assert bool(decoder) == recipe.replace("_balanced", "").endswith("mim")
    assert {f"query.decoder.{name}" for name in pretrained.decoder} == decoder.keys()
    assert all(torch.equal(tensor, decoder[f"query.decoder.{name}"]) for name, tensor in pretrained.decoder.items())
    initial = Learner(load_config(folder / "config.yaml")).query.encoder.state_dict()
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in pretrained.tensors.items())


def test_no_identifier_of_a_subject_leaves_with_the_weights(write_prepared, train):
    write_prepared()
    folder = train("mcl_mim", "steps=2")
    for name in ("encoder.safetensors", "checkpoint_final.pth", "progress.csv", "config.yaml"):
        assert b"sub_" not in (folder / name).read_bytes()


def test_the_figures_of_the_run_are_written_down(write_prepared, train_with_pictures):
    write_prepared()
    folder = train_with_pictures("mcl_mim")
    table = pd.read_csv(folder / "progress.csv")
    assert table["step"].tolist() == [0, 2, 4]
    expected = {
        "loss/contrastive",
        "loss/masked",
        "contrastive/accuracy",
        "contrastive/negatives",
        "gradient/contrastive",
        "gradient/masked",
        "gradient/cosine",
        "gradient/total",
        "queue/effective_rank",
        "queue/uniformity",
        "validation/cross_modality_distance",
        "validation/loss/masked",
        "validation/error/t1",
        "validation/error/flair",
        "speed/steps_per_second",
        "speed/waiting",
        "memory/peak_gib",
        "schedule/learning_rate",
        "schedule/momentum",
        "schedule/contrastive_weight",
    }
    assert expected <= set(table.columns)
    assert table["validation/cross_modality_distance"].notna().tolist() == [True, False, True]
    assert (folder / "progress.png").stat().st_size > 10_000
    assert (folder / "reconstruction.png").is_file()
    assert list((folder / "events").glob("events.out.tfevents*"))
    log = (folder / "training_log.txt").read_text()
    assert "step 4: contrastive" in log
    assert "8 subjects, 8 sessions, 20 scans" in log


def test_records_of_steps_that_were_lost_are_dropped(write_prepared, train):
    write_prepared()
    folder = train("mim", "steps=4")
    for path in ("checkpoint_00000004.pth", "checkpoint_latest.pth"):
        (folder / path).unlink()
    train("mim", "steps=4", resume=True)
    assert pd.read_csv(folder / "progress.csv")["step"].tolist() == [0, 2, 4]


BALANCES = {
    "clip": ["balance=clip", "branches.contrastive=0.1"],
    "equal_norms": ["balance=equal_norms"],
    "learning_rates": ["balance=learning_rates", "branches.masked=0.5"],
}


@pytest.mark.parametrize("balance", BALANCES)
def test_a_balanced_run_ends_bit_for_bit_the_same_whether_or_not_it_was_broken(write_prepared, train, balance):
    write_prepared()
    small = ["swin.depths=1,1", "swin.num_heads=1,2", "patch_size=16", "accumulation=2", "validation.every=100"]
    folder = train("mcl_mim", *small, *BALANCES[balance])
    unbroken = checkpoint(folder)
    for path in ("checkpoint_00000004.pth", "checkpoint_latest.pth"):
        (folder / path).unlink()
    before = checkpoint(folder, "checkpoint_00000002.pth")
    train("mcl_mim", *small, *BALANCES[balance], resume=True)
    again = checkpoint(folder)
    torch.testing.assert_close(again["learner"], unbroken["learner"], rtol=0, atol=0)
    torch.testing.assert_close(again["optimizer"]["state"], unbroken["optimizer"]["state"], rtol=0, atol=0)
    assert any(not torch.equal(tensor, before["learner"][name]) for name, tensor in again["learner"].items())
    assert ("branch_norms" in again["learner"]) == (balance == "equal_norms")
    with pytest.raises(UserError, match=f"cannot be continued with these settings: balance was {balance}, is sum"):
        train("mcl_mim", *small, "steps=6", resume=True)
    table = pd.read_csv(folder / "progress.csv")
    assert {f"gradient/depth/{depth}/cosine" for depth in ("0_embedding", "1_stage1", "2_stage2")} <= set(table.columns)
    scaled = {"gradient/balance/contrastive", "gradient/balance/masked"}
    assert scaled & set(table.columns) == (set() if balance == "learning_rates" else scaled)


def test_without_a_checkpoint_continuing_begins(write_prepared, train, caplog):
    write_prepared()
    with caplog.at_level("INFO"):
        folder = train("mim", "steps=2", resume=True)
    assert "There is no checkpoint in" in caplog.text
    assert checkpoint(folder)["step"] == 2


def test_a_finished_run_is_left_alone(write_prepared, train, caplog):
    write_prepared()
    folder = train("mim", "steps=2")
    before = (folder / "checkpoint_latest.pth").read_bytes()
    with caplog.at_level("INFO"):
        train("mim", "steps=2", resume=True)
    assert "is finished: 2 of 2 steps" in caplog.text
    assert (folder / "checkpoint_latest.pth").read_bytes() == before


def test_a_run_killed_before_it_wrote_the_encoder_writes_it_on_continuing(write_prepared, train):
    write_prepared()
    folder = train("mim", "steps=2")
    written = read_checkpoint(folder / "encoder.safetensors")
    for name in ("encoder.safetensors", "checkpoint_final.pth"):
        (folder / name).unlink()
    train("mim", "steps=2", resume=True)
    again = read_checkpoint(folder / "encoder.safetensors")
    assert all(torch.equal(tensor, written.tensors[name]) for name, tensor in again.tensors.items())
    assert (folder / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_work_on_one_folder(write_prepared, train, monkeypatch, resume):
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0)
    write_prepared()
    folder = train("mim", "steps=2")
    (folder / ".1.partial.checkpoint_00000002.pth").write_bytes(b"of a run that was killed")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    with locked(folder, "nnssl_pretrain"), pytest.raises(UserError, match="Another nnssl_pretrain is at work on"):
        train("mim", "steps=4", resume=resume)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"} == kept
    train("mim", "steps=4", resume=True)
    assert not list(folder.glob(".*partial*"))


@pytest.mark.parametrize("setting", ["seed=1", "validation.fraction=0.5"])
def test_a_run_does_not_go_on_with_other_subjects_held_out(write_prepared, train, setting):
    write_prepared()
    train("mim", "steps=2")
    with pytest.raises(UserError, match=f"cannot be continued with these settings: {setting.split('=')[0]} was"):
        train("mim", "steps=4", setting, resume=True)


@pytest.mark.parametrize(
    "changed", [{"spacing": [2.0, 1.0, 1.0]}, {"spacing": [1.0, 1.0, 1.0], "skull_strip": "hd-bet"}]
)
def test_a_run_does_not_go_on_with_scans_that_were_prepared_otherwise(write_prepared, train, changed):
    plans = write_prepared() / "nnUNetSSLPlans.json"
    train("mim", "steps=2")
    plans.write_text(json.dumps(json.loads(plans.read_text()) | {"preprocessing": changed}))
    with pytest.raises(UserError, match=f"the corpus' {list(changed)[-1]} was"):
        train("mim", "steps=4", resume=True)


def test_a_run_is_never_overwritten(write_prepared, train):
    write_prepared()
    train("mim", "steps=2")
    with pytest.raises(UserError, match=r"holds a run of this recipe already. Continue it with --c"):
        train("mim", "steps=2")


@pytest.mark.parametrize("resume", [False, True])
def test_an_encoder_without_its_run_is_never_overwritten(write_prepared, train, nnunet_folders, resume):
    write_prepared()
    fetched = nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / "mim" / "encoder.safetensors"
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(b"from elsewhere")
    with pytest.raises(UserError, match=r"holds encoder.safetensors and no run .* --set recipe=..., or move the file"):
        train("mim", "steps=2", resume=resume)
    assert [path.name for path in fetched.parent.iterdir() if path.suffix != ".lock"] == [fetched.name]


def test_a_finished_run_that_is_extended_ends_anew(write_prepared, train, monkeypatch):
    write_prepared()
    folder = train("mim", "steps=2")
    ends = [folder / name for name in ("encoder.safetensors", "checkpoint_final.pth")]
    unfinished = []

    def step(*given, **options):
        unfinished.append(not any(path.exists() for path in ends))
        return training_step(*given, **options)

    monkeypatch.setattr(loop, "training_step", step)
    train("mim", "steps=4", resume=True)
    assert unfinished == [True, True]
    encoder, final = read_checkpoint(ends[0]), checkpoint(folder, ends[1].name)
    assert encoder.step == final["step"] == 4
    for name, tensor in encoder.tensors.items():
        assert torch.equal(tensor, final["learner"][f"query.encoder.{name}"])


def test_a_checkpoint_of_another_architecture_is_refused(write_prepared, train):
    write_prepared()
    folder = train("mim", "steps=2")
    with pytest.raises(UserError, match=r"swin.embed_dim was 8, is 16"):
        train("mim", "steps=4", "swin.embed_dim=16", "swin.num_heads=2,2,2,2", resume=True)
    assert load_config(folder / "config.yaml").swin.embed_dim == 8, "the settings beside the results are the run's"


def test_a_changed_setting_is_said_aloud_and_taken(write_prepared, train, caplog):
    write_prepared()
    train("mim", "steps=2")
    folder = train("mim", "steps=4", "learning_rate=0.0003", resume=True)
    assert "learning_rate was 0.0001, is 0.0003" in caplog.text
    assert checkpoint(folder)["step"] == 4


def test_a_branch_that_the_checkpoint_does_not_know_is_refused(write_prepared, train):
    write_prepared()
    train("mcl", "steps=2")
    with pytest.raises(UserError, match=r"cannot be continued with these settings: .*lesions\.stride was None, is 8"):
        train("mcl", "steps=4", "lesions.weight=1", resume=True)


@pytest.mark.slow
def test_a_run_of_every_branch_that_is_continued_ends_bit_for_bit_as_the_unbroken_one(write_prepared, train):
    write_prepared()
    branches = ["masked.target=voxels", "lesions.weight=1", "steps=4"]
    folder = train("mcl_dense", *branches)
    whole = checkpoint(folder, "checkpoint_final.pth")
    for name in ("checkpoint_00000004.pth", "checkpoint_latest.pth", "checkpoint_final.pth"):
        (folder / name).unlink()
    train("mcl_dense", *branches, resume=True)
    again = checkpoint(folder, "checkpoint_final.pth")
    assert again["step"] == 4
    for name, tensor in whole["learner"].items():
        assert torch.equal(again["learner"][name], tensor), name
    table = pd.read_csv(folder / "progress.csv")
    figures = {"loss/lesions", "loss/dense", "gradient/lesions", "gradient/dense", "validation/lesions/accuracy"}
    assert {*figures, "validation/dense/accuracy", "gradient/cosine/lesions-dense"} <= set(table)


def test_another_weight_decay_is_taken(write_prepared, train):
    write_prepared()
    train("mim", "steps=2")
    folder = train("mim", "steps=4", "weight_decay=0.3", resume=True)
    groups = checkpoint(folder)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def restored(folder):
    """A learner with the newest checkpoint of a run, on the corpus as it is now."""
    learner = Learner(load_config(folder / "config.yaml"))
    outputs.restore(folder, learner, build_optimizer(learner.query, learner.config), open_corpus(500))
    return learner


def test_a_corpus_of_others_empties_the_queue(write_prepared, train, caplog):
    """A subject's number is its rank among the names, so a name that goes before the others shifts them all."""
    manifest = write_prepared() / "manifest.tsv"
    folder = train("mcl", "steps=2")
    assert len(restored(folder).queue.filled()) == 8
    assert "are not those" not in caplog.text

    scans = pd.read_csv(manifest, sep="\t", dtype=str, keep_default_na=False)
    scans.replace({"A/sub_7": "A/sub_0a", "A/sub_7/ses_1": "A/sub_0a/ses_1"}).to_csv(manifest, sep="\t", index=False)
    assert len(restored(folder).queue.filled()) == 0
    assert "are not those that the checkpoint was written with: the queue begins empty" in caplog.text
    assert "held out for validation may have changed" in caplog.text

    old = checkpoint(folder)
    del old["roster"]
    torch.save(old, folder / "checkpoint_latest.pth")
    assert len(restored(folder).queue.filled()) == 8, "checkpoints from before say nothing about names"


def test_memory_that_does_not_suffice_is_explained(write_prepared, train, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(loop, "training_step", step)
    gpu = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    write_prepared()
    with pytest.raises(UserError, match=r"not fit the 24 GiB .* accumulation=4, .*checkpointing=true, .*patch_size"):
        train("mim", "accumulation=2")


def test_a_worker_that_dies_during_a_step_is_explained(write_prepared, train, monkeypatch):
    def step(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(loop, "training_step", step)
    write_prepared()
    with pytest.raises(UserError, match="A process that reads scans died"):
        train("mim")


def held_out_files():
    _, validation = open_corpus(500).split(0.3)
    return [validation.path(row) for row in range(len(validation))]


@pytest.mark.parametrize("recipe", ["mcl_mim", "mim"])
def test_damaged_held_out_scans_are_left_out_and_the_training_ends_well(write_prepared, train, caplog, recipe):
    write_prepared()
    damaged = held_out_files()[0]
    damaged.write_bytes(damaged.read_bytes()[:700])
    folder = train(recipe)
    assert (folder / "encoder.safetensors").is_file()
    assert f"{damaged} cannot be read (" in caplog.text
    assert f"1 of {len(held_out_files())} scans are left out" in caplog.text
    figures = pd.read_csv(folder / "progress.csv")
    assert figures["validation/cross_modality_distance"].notna().any()


def test_a_training_whose_held_out_scans_are_all_damaged_does_not_begin(write_prepared, train):
    write_prepared()
    for path in held_out_files():
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"Not one of \d+ scans can be read. The first: .*nnssl_prepare -d"):
        train("mim")


def spoil(folder):
    """Fill every scan of a prepared corpus with values that are no numbers."""
    for path in (folder / "nnUNetSSLPlans_3d_fullres").glob("*.b2nd"):
        shape = blosc2.open(str(path)).shape
        path.unlink()
        blosc2.asarray(np.full(shape, np.nan, np.float16), urlpath=str(path))


def test_losses_that_are_not_finite_stop_the_training_and_name_the_scans(write_prepared, train, nnunet_folders):
    spoil(write_prepared())
    with pytest.raises(UserError, match="not finite in 3 steps running"):
        train("mim", "max_nonfinite=3")
    folder = nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K" / "mim"
    suspects = json.loads((folder / "nonfinite_rank0.json").read_text())
    assert [one["step"] for one in suspects] == [0, 1, 2]
    assert all(scan.startswith("A__sub_") for one in suspects for scan in one["scans"])


def test_skipped_steps_are_counted_and_survive_a_checkpoint(write_prepared, train):
    spoil(write_prepared())
    folder = train("mim", "steps=2")
    assert checkpoint(folder)["skipped"] == 2
    assert pd.read_csv(folder / "progress.csv")["nonfinite_steps"].iloc[-1] == 2


def test_a_corpus_without_pairs_is_refused_for_mcl(write_prepared, train):
    write_prepared(modalities=("t1",))
    with pytest.raises(UserError, match="No session has two different known modalities in one place: mcl needs"):
        train("mcl")


def test_a_patch_larger_than_every_scan_is_refused(write_prepared, train):
    write_prepared()
    with pytest.raises(UserError, match="patch"):
        train("mim", "patch_size=128,128,128")


def test_an_unwritable_results_folder_is_explained(write_prepared, train, nnunet_folders):
    write_prepared()
    (nnunet_folders["nnUNet_results"] / "Dataset500_FOMO60K").write_text("a file in the way")
    with pytest.raises(UserError, match="results cannot be written to"):
        train("mim")


def test_a_batch_that_cannot_be_shared_out_is_refused(write_prepared, train):
    write_prepared()
    with pytest.raises(UserError, match="batch_size=2 cannot be shared by 1 processes in 4 parts"):
        train("mim", "accumulation=4")


def test_held_out_subjects_without_pairs_are_no_obstacle(write_prepared, train, caplog):
    write_prepared(n_subjects=5, unpaired=6)
    folder = train("mcl", "validation.fraction=0.01", "seed=1")
    assert (folder / "encoder.safetensors").is_file()


def test_a_single_subject_can_be_trained_on(write_prepared, train):
    write_prepared(n_subjects=1, unpaired=0)
    assert (train("mcl_mim") / "encoder.safetensors").is_file()
