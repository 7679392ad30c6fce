"""What earlier versions left on disk opens as it did: samples of every kind of file, made by samples/make.py."""

import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.corpus.indexing import index_corpus
from nnunet_ssl.corpus.prepare import PreparationConfig, prepare_corpus
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.evaluation.encoding import EncodingConfig, embed_corpus
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.loop import pretrain
from nnunet_ssl.pretraining.run.records import Records
from nnunet_ssl.trainers.arms import ARMS
from nnunet_ssl.trainers.plans import saved_plans
from nnunet_ssl.weights.encoders import read_checkpoint

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.tar.xz"))
PLANS = {"0.1.0": "nnsslPlans", "today": "nnUNetSSLPlans"}
CPU = torch.device("cpu")


@pytest.fixture(params=SAMPLES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def sample(request, tmp_path, monkeypatch):
    """A version's files, unpacked, with nnU-Net's variables set to them."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    for file in tmp_path.rglob("*"):
        if file.suffix in (".tsv", ".json", ".jsonl") and "/SAMPLES" in (text := file.read_text()):
            file.write_text(text.replace("/SAMPLES", str(tmp_path)))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("nnssl_settings", raising=False)
    monkeypatch.delenv("nnssl_checkpoint", raising=False)
    return tmp_path


@pytest.fixture
def plans(request):
    """What the sample's plans are called."""
    return PLANS[request.node.callspec.id]


def run_of(sample):
    return sample / "nnUNet_results" / "Dataset500_FOMO60K" / "mcl_mim"


def model_of(sample):
    (folder,) = (sample / "nnUNet_results" / "Dataset701_Ball").iterdir()
    return folder


def test_a_store_is_opened_and_a_new_scan_joins_it(sample, plans, contents, monkeypatch):
    store = sample / "nnUNet_preprocessed" / "Dataset500_FOMO60K"
    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.corpus.session.read_volume", lambda *_: pytest.fail("a scan was read again"))
        prepare_corpus(500, PreparationConfig())
    assert contents(store) == before
    new = sample / "fomo/sub_9/ses_1/t1.nii.gz"
    new.parent.mkdir(parents=True)
    new.write_bytes((sample / "fomo/sub_0/ses_1/t1.nii.gz").read_bytes())
    index_corpus(sample / "fomo", 500, "FOMO60K")
    prepare_corpus(500, PreparationConfig())
    corpus = open_corpus(500)
    assert corpus.folder == store / f"{plans}_3d_fullres"
    assert (len(corpus), len(corpus.paired_scans())) == (11, 10)
    row = corpus.scans.index[corpus.scans["subject"].str.endswith("sub_9")][0]
    copied = corpus.scans.index[corpus.scans["scan_id"].str.endswith("sub_0__ses_1__t1")][0]
    size = [10, 10, 10]
    assert np.ptp(corpus.read_patch(row, [2, 2, 2], size)) > 1
    assert np.allclose(corpus.read_patch(row, [2, 2, 2], size), corpus.read_patch(copied, [2, 2, 2], size), atol=0.5)


def test_a_pretraining_goes_on_where_it_stopped(sample, monkeypatch, caplog):
    monkeypatch.setattr(Records, "plot", lambda records: None)
    monkeypatch.setattr(Records, "picture", lambda *_: None)
    folder = run_of(sample)
    before = torch.load(folder / "checkpoint_latest.pth", weights_only=True)
    pretrain(load_config(folder / "config.yaml", ["steps=3"]), 500, True, CPU)
    changed = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert changed == ["Continuing with a changed setting: steps was 2, is 3."]
    assert pd.read_csv(folder / "progress.csv")["step"].tolist() == [0, 1, 2, 3]
    after = torch.load(folder / "checkpoint_latest.pth", weights_only=True)
    assert after["learner"].keys() == before["learner"].keys()
    assert after["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    for name, tensor in before["learner"].items():
        if name.startswith("query.") and tensor.is_floating_point():
            assert (after["learner"][name] - tensor).abs().max() < 1e-3, "one small step from there"
    assert read_checkpoint(folder / "encoder.safetensors").step == 3


@pytest.mark.parametrize("file", ["encoder.safetensors", "checkpoint_latest.pth"])
def test_an_encoder_sees_what_it_saw(sample, file):
    embeddings = embed_corpus(run_of(sample) / file, 500, EncodingConfig(), CPU)
    measured = np.load(sample / "measured/embeddings.npz")["embeddings"]
    assert np.allclose(embeddings.vectors, measured, atol=1e-4)


def test_a_model_predicts_what_it_predicted(sample):
    """By nnU-Net alone, from the plans, the network of which is ours."""
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_of(sample)), (0,), "checkpoint_final.pth")
    image = sample / "nnUNet_raw/Dataset701_Ball/imagesTs/case_9_0000.nii.gz"
    (given,) = predictor.predict_from_files_sequential([[str(image)]], None, save_probabilities=True)
    mask, probabilities = given
    expected = np.load(sample / "predicted/every_third.npy")
    assert np.allclose(probabilities[:, ::3, ::3, ::3], expected, atol=1e-3)
    stored = np.asarray(nibabel.load(sample / "predicted/case_9.nii.gz").dataobj).T
    assert (mask != stored).mean() < 0.001
    assert expected.std() > 1e-3


def test_a_finetuning_is_taken_up_with_its_settings_and_network(sample, plans):
    folder = model_of(sample)
    written = saved_plans(folder)
    assert written["nnunet_ssl"]["base"] == plans
    cases = sample / "nnUNet_preprocessed/Dataset701_Ball" / f"{plans}_3d_fullres"
    cases.mkdir()
    (cases / "case_0.b2nd").touch()  # nnU-Net asks of what kind the cases are, and reads none before it trains
    dataset = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    trainer = ARMS["nnUNetTrainerMCLMIM"](written | {"continue_training": True}, "3d_fullres", 0, dataset, CPU)
    assert Path(trainer.output_folder_base) == folder, "settings have the names that they had"
    assert (trainer.settings.steps, trainer.settings.patch_size, trainer.settings.lr) == (2, (16, 16, 16), 0.01)
    trainer.load_checkpoint(str(folder / "fold_0/checkpoint_final.pth"))
    stored = torch.load(folder / "fold_0/checkpoint_final.pth", weights_only=False)["network_weights"]
    assert stored.keys() == trainer.network.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trainer.network.state_dict().items())
    assert trainer.current_epoch == 2
